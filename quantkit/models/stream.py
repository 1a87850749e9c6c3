"""Run a model block by block without ever holding it: hidden states go in, hidden states come out.

What surrounds the blocks (embeddings, masks, rotary tables, alibi, final norm, head, soft-capping) is the model's own
code: its forward runs with recorders in place of the blocks. Its weights are read when a module runs and dropped behind
it, so between calls nothing of the model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton, restore_buffers

ReadTensors = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Canonical names of tensors outside the blocks -> the tensors."""


@dataclass
class Captured:
    """What enters the blocks of a model for one batch."""

    hidden: Tensor
    """[B, T, H]: the input of the first block."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Per block: the other arguments it is called with (masks, position embeddings, ...)."""
    input_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor | None
    """[B, T] or None"""


class BlockStream:
    """The model of a skeleton, run block by block.

    Attention runs in the implementation that transformers picks for the model by itself, the same that
    ``from_pretrained`` uses.
    """

    def __init__(self, skeleton: Skeleton, source: Checkpoint | ReadTensors, dtype: torch.dtype) -> None:
        """
        Args:
            skeleton: the model's structure.
            source: where the tensors outside the blocks come from.
            dtype: in which everything is computed; stored tensors are cast while they are in use.
        """
        self._skeleton = skeleton
        self._source = source
        self._dtype = dtype
        self._model = skeleton.new_model(dtype)
        self._returns_tuple = False
        self._on_block: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]
        blocks = self._model.get_submodule(skeleton.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        for index in range(len(blocks)):
            blocks[index] = _Recorder(blocks[index], index, self._call)
        for path, module in self._model.named_modules():
            if isinstance(module, _Recorder):
                continue
            restore_buffers(self._model, path, module, recurse=False)
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._loader(path))
                module.register_forward_hook(_unload)

    @torch.no_grad()
    def capture(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Captured:
        """Run the model's forward up to its blocks.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 where there is a token; None: everywhere.
        """
        for _ in range(2):  # a second time if it turns out that the model wants tuples from its blocks
            captured = Captured(torch.empty(0), [], input_ids, attention_mask)
            try:
                self._run(captured, self._recorder(captured))
            except _AllRecorded:
                return captured
            except _WrongForm:
                self._returns_tuple = not self._returns_tuple
        raise RuntimeError(f"{self._skeleton.class_name} changes the hidden states between its blocks")

    @torch.no_grad()
    def run_block(self, module: nn.Module, hidden: Tensor, index: int, captured: Captured) -> Tensor:
        """hidden [B, T, H] behind block ``index``, computed by ``module`` (from ``Skeleton.build_block``)."""
        args, kwargs = captured.calls[index]
        output = module(hidden, *args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        return output[0] if self._returns_tuple else output

    @torch.no_grad()
    def logits(self, hidden: Tensor, captured: Captured) -> Tensor:
        """The model's logits from hidden [B, T, H] behind the last block of the batch that ``captured`` is of.

        [B, T, vocabulary]; of a classifier [B, labels].
        """
        last = self._skeleton.num_blocks - 1
        output = self._run(captured, lambda index, args, kwargs: hidden if index == last else captured.hidden)
        return output.logits

    def _run(self, captured: Captured, on_block: Callable[..., Tensor]) -> Any:
        self._on_block = on_block
        return self._model(input_ids=captured.input_ids, attention_mask=captured.attention_mask, use_cache=False)

    def _call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | tuple[Tensor]:
        output = self._on_block(index, args, kwargs)
        return (output,) if self._returns_tuple else output

    def _recorder(self, captured: Captured) -> Callable[..., Tensor]:
        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if index == 0:
                captured.hidden = hidden
            elif not isinstance(hidden, Tensor) or hidden.shape != captured.hidden.shape:
                raise _WrongForm  # the model took outputs[0] of a tensor, or was handed a tuple it did not expect
            captured.calls.append((rest, kwargs))
            if index == self._skeleton.num_blocks - 1:
                raise _AllRecorded  # what follows is for ``logits``
            return hidden

        return record

    def _loader(self, path: str) -> Callable[[nn.Module, Any], None]:
        """A forward pre-hook that puts real parameters into the module at ``path``."""
        known = set(self._skeleton.other_tensors())
        tied = self._skeleton.model.all_tied_weights_keys
        partner = tied | {source: target for target, source in tied.items()}

        def load(module: nn.Module, _: Any) -> None:
            stored = {name: f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
            stored = {name: full if full in known else partner[full] for name, full in stored.items()}
            tensors = self._read(list(stored.values()))
            for name, full in stored.items():
                module._parameters[name] = nn.Parameter(tensors[full].to(self._dtype), requires_grad=False)

        return load

    def _read(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        if isinstance(self._source, Checkpoint):
            return self._skeleton.read_tensors(names, self._source)
        return self._source(names)


class _AllRecorded(Exception):
    """Ends the model's forward once the last block has been called."""


class _WrongForm(Exception):
    """The model did not get back from a block what it handles: a tensor where it wants a tuple, or the other way."""


class _Recorder(nn.Module):
    """Stands in for a block: reads of its attributes (``attention_type``, ...) reach the block itself."""

    def __init__(
        self, block: nn.Module, index: int, call: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters are not the model's any more
        self._index = index
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._index, args, kwargs)


def _unload(module: nn.Module, _: Any, output: Any) -> Any:
    """A forward hook that drops the parameters that ``_loader`` put in."""
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return output
