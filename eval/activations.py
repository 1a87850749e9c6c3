"""What enters the linears of a model on a short text: how far it is from flat, and a piece of it to look at.

A row of inputs is rounded to a grid that spans its largest value. With rms the root mean square of all entries,

    peak = max |x| / rms        crest = mean over tokens of (max over channels |x_t| / rms(x_t))

say how much of the grid a few outliers use up: 1 where all values have one size, about 3 for normally distributed rows
of a few hundred channels, tens to hundreds where single channels stand out (Sun et al., FlatQuant, arXiv 2410.09426,
section 2). Of a quantised linear it is what its rounding sees: the input behind its scale, shift and matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.calibrate.text import Text
from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.perplexity import token_windows
from quantkit.kernels.reference import fake_quantize, transform_input
from quantkit.layers.quant_linear import QuantLinear
from quantkit.recipe import ActivationScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 512
"""Tokens of text, in windows of ``SEQLEN``."""
SEQLEN = 256
SAMPLE = 64
"""Tokens of the first window that are kept as they are."""


@dataclass(frozen=True, eq=False)
class Activation:
    """The input of one linear."""

    name: str
    absmax: Tensor
    """[channels] float32, max |x| over the tokens."""
    sample: Tensor
    """[at most SAMPLE tokens, channels] float32, the first that came."""
    tokens: int
    rms: float
    """Root mean square of all entries."""
    crest: float
    """Mean over tokens of the largest |x| over the token's own rms."""
    rounding: ActivationScheme | None
    """How it is rounded (a float model: how it would be); None: not at all."""
    error: float | None
    """Squared error of that rounding over the squared input."""

    @property
    def peak(self) -> float:
        return float(self.absmax.max()) / self.rms if self.rms else 0.0


def collect(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Text,
    *,
    names: Collection[str] | None = None,
    patterns: Sequence[str] = (),
    roundings: Mapping[str, ActivationScheme] | None = None,
    tokens: int = TOKENS,
) -> dict[str, Activation]:
    """Run ``text`` through ``model`` and look at what enters its linears; those that no token reached are left out.

    Args:
        names: module paths; None: those that ``choose`` takes, one of each set with the same input.
        patterns: for ``choose``.
        roundings: path -> how the input of a linear that is not quantised is rounded for ``error``.
        tokens: of the text; at least two.

    Raises:
        RecipeError: no linear is called like a pattern, or no such number of tokens.
        QuantkitError: too little text, a foreign tokenizer, layers that are not in memory.
    """
    wanted = choose(model, patterns) if names is None else [name for name in names if _is_linear(model, name)]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or SEQLEN
    windows = token_windows(model, tokenizer, text, seqlen=min(SEQLEN, positions, tokens), max_tokens=tokens)
    looks = {name: _Look((roundings or {}).get(name)) for name in wanted}
    with ExitStack() as hooks, torch.inference_mode():
        for name, look in looks.items():
            module = model.get_submodule(name)
            if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                raise QuantkitError(f"{name} is not in memory (offloaded): use --device cpu.")
            hooks.callback(module.register_forward_pre_hook(look.hook(module)).remove)
        for window in windows.tokens:
            model.base_model(input_ids=window[None].to(model.device))  # without the head: its logits are large
    found = {name: look.result(name) for name, look in looks.items() if look.tokens}
    return found if names is not None else _distinct(found)


def choose(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Linears to look at, in model order.

    Args:
        patterns: globs of module paths; none: of the first, the middle and the last block all linears, of experts the
            first one. In a quantised model only quantised linears are looked at.

    Raises:
        RecipeError: a pattern fits no linear.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)]
    quantised = [name for name in linears if isinstance(model.get_submodule(name), QuantLinear)]
    linears = quantised or linears
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise RecipeError(f"no linear is called like '{pattern}'; one is {linears[0]}, and * stands for anything.")
    if patterns:
        return [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]
    inside = {name: [int(part) for part in re.findall(r"(?:^|\.)(\d+)(?=\.)", name)] for name in linears}
    blocks = sorted({numbers[0] for numbers in inside.values() if numbers})
    if not blocks:
        return linears
    shown = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    return [name for name, numbers in inside.items() if numbers and numbers[0] in shown and not any(numbers[1:])]


def _is_linear(model: nn.Module, name: str) -> bool:
    """Merged experts have no module of their own where the model is not quantised."""
    try:
        return isinstance(model.get_submodule(name), nn.Linear | QuantLinear)
    except AttributeError:
        return False


def _distinct(found: Mapping[str, Activation]) -> dict[str, Activation]:
    """Without inputs that are the same as one before: of q, k and v the first."""
    kept: dict[str, Activation] = {}
    for name, one in found.items():
        if not any(torch.equal(one.absmax, other.absmax) for other in kept.values()):
            kept[name] = one
    return kept


class _Look:
    """Sums over the calls of one linear."""

    def __init__(self, rounding: ActivationScheme | None) -> None:
        self.rounding = rounding
        self.tokens = 0
        self._absmax: Tensor | None = None
        self._sample: list[Tensor] = []
        self._squares = self._crests = self._errors = 0.0

    def hook(self, module: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        if isinstance(module, QuantLinear):
            self.rounding = module.format.activations

        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, -2)
            if not isinstance(module, QuantLinear):
                self._take(x, None if self.rounding is None else fake_quantize(x.float(), self.rounding))
                return
            inputs = module.inputs
            self._take(transform_input(x, inputs, None), transform_input(x, inputs, self.rounding))

        return look

    def _take(self, x: Tensor, rounded: Tensor | None) -> None:
        """x, rounded: [tokens, channels]."""
        if not len(x):
            return
        x = x.float()
        absmax = x.abs().amax(dim=0)
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)
        room = SAMPLE - sum(map(len, self._sample))
        if room > 0:
            self._sample.append(x[:room].cpu())
        squares = x.square().sum(dim=1, dtype=torch.float64)
        size = (squares / x.shape[1]).sqrt()
        self._crests += float((x.abs().amax(dim=1) / size.clamp(min=torch.finfo(torch.float32).tiny)).sum())
        self._squares += float(squares.sum())
        if rounded is not None:
            self._errors += float((rounded.float() - x).square().sum(dtype=torch.float64))
        self.tokens += len(x)

    def result(self, name: str) -> Activation:
        assert self._absmax is not None
        entries = self.tokens * len(self._absmax)
        error = self._errors / self._squares if self.rounding is not None and self._squares else None
        return Activation(
            name,
            self._absmax.cpu(),
            torch.cat(self._sample),
            self.tokens,
            (self._squares / entries) ** 0.5,
            self._crests / self.tokens,
            self.rounding,
            error,
        )
