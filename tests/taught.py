"""Block 0 of a tiny model with a lesson about it, for tests of transforms that learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from looked import Looked, looking
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit
from quantkit.blockwise import _limited
from quantkit.formats import writer
from quantkit.formats.layer import LayerFormat
from quantkit.layers.simulate import simulate_inputs
from quantkit.learn.loop import BeginEpoch, Curve, Group
from quantkit.quantizers import rtn
from quantkit.transforms import omniquant
from quantkit.transforms.interface import Observed, Solution

QUICK: dict[str, Any] = {"epochs": 2, "target": "quantised", "holdout": 0.25}


def scatter(
    groups: Sequence[Group], fix: Any, learn: Any, judges: Any, options: Any, seed: int, begin_epoch: BeginEpoch
) -> Curve:
    """In the place of ``train``: every number is drawn at random."""
    begin_epoch(1, 2)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for parameter in group.parameters:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return Curve(holdout=[0.0])


@dataclass
class Taught:
    """Block 0 of a tiny model, with a lesson about it."""

    looked: Looked
    scheme: str
    method: ModuleType

    def solve(self, **options: Any) -> Solution:
        config = self.method.Config(**(QUICK | options))
        solution: Solution = self.method.solve(self.looked.situation, config)
        return solution

    def carry_out(self, solution: Solution) -> nn.Module:
        """The block as a run stores it: solution applied, weights limited and rounded, inputs rounded."""
        looked, block = self.looked, self.looked.block
        state = looked.apply(solution)
        formats = {}
        for name in looked.linears:
            scheme = looked.situation.weights_of(name)
            formats[name] = LayerFormat(weights=scheme, activations=looked.situation.scheme.activations)
            weight = _limited(block.weight(name), state, name, formats[name])
            quantised = rtn.quantize(weight, scheme, torch.float32, rtn.Config())
            block.tensors[f"{name}.weight"] = quantised.dequantize()
        module = looked.module_of(None)
        simulate_inputs(module, formats, state.inputs, looked.session._experts)
        return module

    def loss(self, module: nn.Module, target: Tensor, samples: list[int]) -> float:
        """Squared error of the tokens behind the first, over the mean variance of the target's channels."""
        states = self.looked.session.outputs(module)
        output = torch.cat([states.batch(number) for number in range(self.looked.session.streams.batches)])
        variance = target[:, 1:].var(dim=1).mean()
        return float((output - target)[samples, 1:].square().mean() / variance)


@contextmanager
def taught(folder: Path, scheme: str, method: ModuleType = omniquant) -> Iterator[Taught]:
    with looking(folder, scheme) as looked:
        module, block = looked.module_of(None), looked.block
        readers = list(dict.fromkeys([name for site in block.sites for name in site.consumers] + looked.linears))
        statistics = looked.session.observe(module, readers, ("range", "rows"))
        session = looked.session
        observed = Observed(
            statistics, session.replays(module, looked.linears), session.lessons(module, readers, lambda _: None)
        )
        looked.situation = replace(looked.situation, observed=observed)
        yield Taught(looked, scheme, method)


def check_resumed(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch, **request: Any) -> None:
    """A run that is stopped in its second block and goes on ends in the bytes of one that was not."""
    quantkit.quantize(str(source), output=root / "whole", **request)

    def stop_at_the_second_block(self: Any, key: str, *rest: Any) -> None:
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    write = writer.CheckpointWriter.write_shard
    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(source), output=root / "stopped", **request)
    monkeypatch.undo()
    quantkit.quantize(str(source), output=root / "stopped", resume=True, **request)
    whole, resumed = (load_file(root / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
