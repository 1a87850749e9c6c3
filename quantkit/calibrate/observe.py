"""One hooked forward of a block over all calibration samples, for however many methods want something from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.calibrate.hidden import HiddenStates
from quantkit.calibrate.statistics import InputStatistics, Want
from quantkit.calibrate.streams import StreamName, Streams
from quantkit.layers.quant_experts import ExpertNames, QuantExperts, routed, split_experts
from quantkit.models.block import Site

OnInput = Callable[[str, Tensor, Tensor | None], None]
"""Called with a module's path, the rows that enter it [n, width], and which tokens of the batch they are [n] int64;
None: all tokens in order."""

_IN_ORDER: tuple[StreamName, ...] = ("float", "quantised")


@dataclass
class BlockStatistics:
    """What entered the modules of one block."""

    inputs: dict[str, InputStatistics]
    """Module path -> statistics of its input; modules that read the same tensor (q, k, v) share one object."""
    nonfinite: dict[str, set[int]] = field(default_factory=dict)
    """Module path -> samples with NaN or Inf in its input, which are left out of its statistics. Of modules that share
    an input, the first is named."""

    def of_site(self, site: Site) -> InputStatistics:
        """Statistics of the signal that the consumers of ``site`` read.

        Routed experts see a part of it each; the router or a dense consumer among the observed modules sees all.
        """
        return max((self.inputs[name] for name in site.consumers if name in self.inputs), key=lambda seen: seen.tokens)

    def shared_by(self, name: str) -> list[str]:
        """Every observed module whose input is that of ``name``, itself included."""
        return [other for other, seen in self.inputs.items() if seen is self.inputs[name]]


def observe(
    streams: Streams,
    module: nn.Module,
    names: Collection[str],
    want: Collection[Want],
    *,
    experts: ExpertNames | None = None,
    stream: StreamName = "quantised",
    max_rows: int = 512,
    skip_first: int = 0,
    seed: int = 0,
    outputs: Mapping[StreamName, HiddenStates] | None = None,
    reference: nn.Module | None = None,
) -> BlockStatistics:
    """Run ``module`` as the current block on every batch of ``stream`` and collect what enters the modules ``names``.

    Padding and samples that broke in an earlier block are left out. The streams stay where they are.

    Args:
        streams: standing before the block.
        module: the block as it is to be observed, from ``Skeleton.build_block``; merged experts are taken apart while
            this runs, if one of them is named.
        names: module paths in the block: linears, and whatever else reads a site (routers).
        want: what to collect. ``cross`` sends the float stream, which must be carried, through the same module; a row
            of an expert that the float stream sent elsewhere counts as unchanged.
        experts: what the projections of an expert are called in ``names``.
        stream: the one that is observed.
        max_rows: size of the sample of rows of an input.
        skip_first: positions at the start of every sample, padding not counted, that only ``hessian`` and ``cross``
            see: the first token often draws activations like none behind it.
        seed: of the sample of rows.
        outputs: stream name -> store from ``Streams.new_states`` that gets what the block makes of this stream.
        reference: the block for the float stream, where that is another module: its inputs are not rounded.
    """
    outputs = outputs or {}
    cross = "cross" in want
    needed = {stream, *outputs, *(["float"] if cross else [])}
    passes = [name for name in _IN_ORDER if name in needed]
    generator = torch.Generator().manual_seed(seed)
    first_read: dict[str, InputStatistics] = {}
    nonfinite: dict[str, set[int]] = {}

    def statistics(name: str, width: int) -> InputStatistics:
        if name not in first_read:
            first_read[name] = InputStatistics(width, want, max_rows=max_rows)
        return first_read[name]

    # Not in inference mode: what is collected in it could not be worked on outside.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        hooks = stack.enter_context(_Hooks(module, names, experts or ExpertNames()))
        float_hooks = hooks
        if reference is not None:
            float_hooks = stack.enter_context(_Hooks(reference, names, experts or ExpertNames()))
        for number in range(streams.batches):
            batch = _Batch(streams, number, skip_first, generator, statistics, nonfinite, float_hooks.first_reader)
            for name in passes:
                of_float = name == "float"
                (float_hooks if of_float else hooks).report_to(
                    batch.collect if name == stream else batch.remember if cross else None
                )
                hidden = streams.run(name, number, reference if of_float and reference is not None else module)
                if name in outputs:
                    outputs[name].replace(number, hidden)
        inputs = {}
        for path in names:
            first = hooks.first_reader.get(path, path)
            inputs[path] = statistics(first, _width(module.get_submodule(first)))  # also of an expert no token chose
    return BlockStatistics(inputs, nonfinite)


class _Batch:
    """The tokens of one batch: which count, and what the float stream had for them."""

    def __init__(
        self,
        streams: Streams,
        number: int,
        skip_first: int,
        generator: torch.Generator,
        statistics: Callable[[str, int], InputStatistics],
        nonfinite: dict[str, set[int]],
        float_reader: Mapping[str, str],
    ) -> None:
        mask = streams.token_mask(number)  # [batch, tokens]
        self._counts = mask.flatten()
        self._body = (mask.cumsum(dim=1) > skip_first).flatten() if skip_first else None
        self._keys = torch.rand(mask.numel(), generator=generator)  # for all inputs: they sample the same tokens
        self._length = mask.shape[1]
        self._first_sample = streams.samples(number).start
        self._statistics = statistics
        self._nonfinite = nonfinite
        self._float: dict[str, tuple[Tensor, Tensor]] = {}
        self._float_reader = float_reader

    def remember(self, path: str, x: Tensor, tokens: Tensor | None) -> None:
        """Keep an input of the float stream until the observed stream's comes."""
        self._float[path] = self._sound(path, x, tokens)

    def collect(self, path: str, x: Tensor, tokens: Tensor | None) -> None:
        """Add an input to its statistics."""
        statistics = self._statistics(path, x.shape[1])
        x, tokens = self._sound(path, x, tokens)
        statistics.update(
            x,
            tokens=tokens + self._first_sample * self._length,
            keys=self._keys[tokens],
            body=None if self._body is None else self._body[tokens],
            drift=self._drift(path, x, tokens) if "cross" in statistics.want else None,
        )

    def _sound(self, path: str, x: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows that count, float32, without samples that are not finite, and which tokens of the batch they are."""
        count = len(self._counts)
        known = tokens is not None or len(x) == count  # not for experts that are a list of their own modules
        tokens = torch.arange(len(x)) % count if tokens is None else tokens
        if known and not self._counts.all():
            counts = self._counts[tokens]
            x, tokens = x[counts], tokens[counts]
        x = x.float()
        if not torch.isfinite(x.sum()):
            samples = tokens // self._length
            broken = samples[~torch.isfinite(x).all(dim=1)].unique()
            if len(broken):
                self._nonfinite.setdefault(path, set()).update((broken + self._first_sample).tolist())
                sound = ~torch.isin(samples, broken)
                x, tokens = x[sound], tokens[sound]
        return x, tokens

    def _drift(self, path: str, x: Tensor, tokens: Tensor) -> Tensor:
        """x_float - x for the same tokens; 0 where the float stream's token did not come here."""
        path = self._float_reader.get(path, path)
        if path not in self._float:
            return torch.zeros_like(x)
        reference, reference_tokens = self._float[path]
        if torch.equal(reference_tokens, tokens):
            return reference - x
        place = torch.full((len(self._counts),), -1)
        place[reference_tokens] = torch.arange(len(reference_tokens))
        place = place[tokens]
        drift = torch.zeros_like(x)
        drift[place >= 0] = reference[place[place >= 0]] - x[place >= 0]
        return drift


class _Hooks:
    """Hooks on modules of a block that report every tensor once, however many of the modules read it."""

    def __init__(self, block: nn.Module, names: Collection[str], experts: ExpertNames) -> None:
        self.first_reader: dict[str, str] = {}
        """Module path -> the module whose report was about the same tensor; not there: the module itself."""
        self._block = block
        self._names = names
        self._experts = experts
        self._merged: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._report: OnInput | None = None
        self._seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._choices: dict[str, Tensor] = {}  # path of experts -> top_k_index of this forward

    def report_to(self, report: OnInput | None) -> None:
        """What the next forward's inputs are reported to; None: nobody."""
        self._report = report
        self._seen.clear()

    def __enter__(self) -> _Hooks:
        self._merged = split_experts(self._block, self._names, self._experts)
        mixtures = [path for path, part in self._block.named_modules() if isinstance(part, QuantExperts)]
        for path in mixtures:
            self._add(path, self._remember_choices(path))
        for name in self._names:
            mixture = next((path for path in mixtures if name.startswith(f"{path}.")), None)
            self._add(name, self._reporter(name, mixture))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for path, merged in self._merged.items():
            self._block.set_submodule(path, merged)

    def _add(self, path: str, hook: Callable[..., None]) -> None:
        self._handles.append(self._block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    def _remember_choices(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._choices[path] = args[1] if len(args) > 1 else kwargs["top_k_index"]

        return hook

    def _reporter(self, name: str, mixture: str | None) -> Callable[..., None]:
        expert = int(name.removeprefix(f"{mixture}.").split(".")[0]) if mixture else -1

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._report is None:
                return
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            seen = self._seen.get(id(x))
            if seen is not None and seen[0]() is x:  # an id alone may be that of a tensor that is gone
                self.first_reader[name] = seen[1]
                return
            self._seen[id(x)] = weakref.ref(x), name
            tokens = routed(self._choices[mixture], expert)[1] if mixture else None
            self._report(name, x.reshape(-1, x.shape[-1]), tokens)

        return hook


def _width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]
