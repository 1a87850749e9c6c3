"""What transforms that look at data are given, for tests: a toy pair of linears, or block 0 of a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from situations import situation
from test_pipeline import dense_copy
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer
from torch import Tensor, nn

from quantkit.calibrate.observe import BlockStatistics
from quantkit.calibrate.replay import Call, Replay
from quantkit.calibrate.session import Session
from quantkit.calibrate.statistics import InputStatistics
from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import read_record
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.block import Block, LinearInfo, Site
from quantkit.pipeline import prepare
from quantkit.plan import resolve
from quantkit.presets import expand
from quantkit.recipe import PER_CHANNEL, Scheme, WeightScheme
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Observed, Situation, Solution

CALIBRATION = {"nsamples": 12, "seqlen": 24, "batch_size": 5}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(scheme: str, columns: int) -> WeightScheme:
    """How ``scheme`` stores a matrix of so many columns."""
    parsed = Scheme.parse(scheme).weights
    assert parsed is not None
    return resolve(parsed, columns)


def save_source(name: str, root: Path) -> Path:
    """A folder in ``root`` with the tiny model ``name`` and a tokenizer; made once."""
    if not (root / name).exists():
        save_tiny(name, root / name, vocab_size=VOCABULARY)
        save_tokenizer(root / name)
    return root / name


def toy(weight: Tensor, x: Tensor, scheme: str = "W3A16G32", repeats: int = 1, **changes: Any) -> Situation:
    """Linear p makes the signal x that linear c of ``weight`` [rows, columns] reads as x [tokens, columns]; with
    ``repeats`` each of two heads that many times. Without tokens c is an expert that was never chosen."""
    columns = weight.shape[1]
    tensors = {"p.weight": torch.eye(columns // repeats), "c.weight": weight}
    infos = tuple(LinearInfo(name, *tensors[f"{name}.weight"].shape, has_bias=False) for name in "pc")
    site = Site(
        "hidden", "linear", "p", ("c",), repeats=repeats, head_dim=columns // repeats // 2 if repeats > 1 else 0
    )
    block = Block(0, "layers.0.", tensors, dict.fromkeys(tensors, torch.float32), infos, (site,))
    seen = InputStatistics(columns, ("mean", "rows"))
    seen.update(x, tokens=torch.arange(len(x)), keys=torch.rand(len(x), generator=torch.Generator().manual_seed(0)))
    module = nn.Linear(columns, len(weight), bias=False)
    module.weight = nn.Parameter(weight)
    calls = [Call((x,), {}, None)] if len(x) else []
    observed = Observed(BlockStatistics({"c": seen}), lambda site, tokens: Replay(module, "c.", calls))
    return situation(block, ["c"], scheme, observed=observed, **changes)


@dataclass
class Looked:
    """Block 0 of a model and what calibration shows of it."""

    session: Session
    block: Block
    situation: Situation
    module_of: Callable[[Transformed | None], nn.Module]
    """The block with its tensors as they are, and what a transform has left to be done to inputs."""

    @property
    def linears(self) -> list[str]:
        return [info.name for info in self.block.linears]

    def outputs(self, state: Transformed | None) -> Tensor:
        """What the block makes of the calibration samples."""
        states = self.session.outputs(self.module_of(state))
        return torch.cat([states.batch(number) for number in range(self.session.streams.batches)])

    def apply(self, solution: Solution) -> Transformed:
        """Carry out a solution and see that it left the function as it was."""
        before = self.outputs(None)
        state = Transformed(self.block, self.linears, torch.float32, pytest.fail)
        state.apply("method", solution)
        torch.testing.assert_close(self.outputs(state), before, rtol=2e-4, atol=2e-4 * float(before.abs().max()))
        return state

    def check_limits(self, state: Transformed, solution: Solution) -> None:
        """Weights clamped to the limits and rounded have the recorded error in the block that ``apply`` left."""
        clips = {fact["linear"]: fact for fact in solution.facts if "clipped" in fact}
        seen = self.session.observe(self.module_of(state), self.linears, ("rows",))
        for name, (low, high) in solution.limits.items():
            weight, x = self.block.weight(name), seen.inputs[name].rows
            size = self.situation.weights_of(name).group_size
            width = weight.shape[1] if size == PER_CHANNEL else size
            rounded = self.situation.rounded(name, clamp(weight, low, high, width))
            loss = group_errors(rounded - weight, x, width).sum() / group_errors(weight, x, width).sum()
            assert float(loss) == pytest.approx(clips[name]["clip_loss"], rel=1e-3)
            assert clips[name]["clip_loss"] < clips[name]["clip_loss_before"]


def group_errors(change: Tensor, x: Tensor, width: int) -> Tensor:
    """Sum over tokens of (x_g . d_g)**2 for rows d of ``change`` and groups of ``width``: [rows, groups], float64."""
    parts = zip(change.double().split(width, 1), x.double().split(width, 1), strict=True)
    return torch.stack([(part @ rows.t()).square().sum(1) for part, rows in parts], 1)


def clamp(weight: Tensor, low: Tensor, high: Tensor, width: int) -> Tensor:
    """``weight`` [rows, columns] between limits [rows, groups]."""
    low, high = (limit.repeat_interleave(width, 1)[:, : weight.shape[1]] for limit in (low, high))
    return weight.clamp(low, high)


@contextmanager
def looking(folder: Path, scheme: str) -> Iterator[Looked]:
    """Block 0 of the model in ``folder``, all of its linears about to be rounded as in ``scheme``."""
    recipe = expand(method="gptq", scheme=scheme, calibration=CALIBRATION)
    plan, skeleton, checkpoint = prepare(str(folder), recipe)
    with Session(plan, skeleton, checkpoint, pytest.fail) as session:
        block = skeleton.read_block(0, checkpoint)
        linears = [info.name for info in block.linears]

        def module_of(state: Transformed | None) -> nn.Module:
            module = skeleton.build_block(0, block.tensors, torch.float32)
            if state is not None:
                formats = {name: LayerFormat(weights=weights_of(scheme, 64)) for name in state.inputs}
                simulate_inputs(module, formats, state.inputs, skeleton.expert_names)
            return module

        module = module_of(None)
        readers = dict.fromkeys([name for site in block.sites for name in site.consumers] + linears)
        statistics = session.observe(module, list(readers), ("mean", "rows"))
        observed = Observed(statistics, session.replays(module, linears))
        yield Looked(session, block, situation(block, linears, scheme, observed=observed), module_of)


def facts_of(folder: Path) -> list[dict[str, Any]]:
    """What the transforms of a run recorded."""
    return [fact for event in read_record(folder / "quantkit-run.jsonl") for fact in event.get("transforms", ())]


def check_reload(folder: Path, scratch: Path) -> None:
    """Reloaded in a new process a checkpoint computes what a dense copy of it does."""
    expected = fresh_logits.logits_of("in-process", dense_copy(folder, scratch))
    found = fresh_logits.logits_of("quantkit", folder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
