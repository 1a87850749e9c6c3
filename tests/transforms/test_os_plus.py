"""OS+: what its shifts, scales and search promise, and what is left of it in a reloaded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from safetensors.torch import load_file
from situations import situation
from test_pipeline import dense_copy
from tiny_models import TINY
from torch import Tensor, nn

import quantkit
from quantkit.calibrate.observe import BlockStatistics
from quantkit.calibrate.replay import Call, Replay
from quantkit.calibrate.statistics import InputStatistics
from quantkit.formats import writer
from quantkit.formats.writer import read_record
from quantkit.kernels import reference
from quantkit.kernels.reference import fake_quantize, grid_over
from quantkit.models.block import Block, LinearInfo, Site
from quantkit.plan import resolve
from quantkit.quantizers import rtn
from quantkit.recipe import Scheme
from quantkit.transforms import os_plus, smoothquant
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Observed, SiteChange, Situation, Solution

RECOMMENDED, FAITHFUL = os_plus.Config(), os_plus.Config(preset="faithful")
SCALE_ONLY = os_plus.Config(shift="never")
NORM = Site("mlp.input", "norm", "norm", ("part.a", "part.b"))
CALIBRATION = {"nsamples": 12, "seqlen": 24, "batch_size": 5}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loud(tokens: int = 512, width: int = 256, out: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, width] with six loud channels, four of them far from zero, and a weight [out, width]."""
    x = gaussian(tokens, width, seed=1)
    x[:, :6] *= torch.tensor([3.0, 5, 2, 6, 4, 3])
    x[:, :6] += torch.tensor([30.0, -45, 60, -25, 0, 0])
    return x, 0.05 * gaussian(out, width, seed=2)


class Part(nn.Module):
    """Two linears that read one signal; what comes out is a product of both."""

    def __init__(self, a: nn.Linear, b: nn.Linear) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) * self.b(x)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.load_state_dict({"weight": weight, "bias": bias})
    return module


class Case:
    """A signal ``x`` [tokens, width] between a norm and linears (one for a v -> o site), and what a search sees."""

    def __init__(
        self,
        x: Tensor,
        weights: list[Tensor],
        scheme: str,
        *,
        site: Site | None = None,
        biases: list[Tensor] | None = None,
        padding: int = 0,
        skipped: int = 0,
        norm_bias: bool = True,
    ) -> None:
        self.x, self.weights = x, weights
        self.scheme = Scheme.parse(scheme)
        self.site = site or (NORM if len(weights) == 2 else Site("mlp.input", "norm", "norm", ("part",)))
        names = self.site.consumers
        self.biases = biases or [torch.zeros(len(weight)) for weight in weights]
        width = x.shape[1] // self.site.repeats
        tensors = {"norm.weight": torch.ones(width)} | ({"norm.bias": torch.zeros(width)} if norm_bias else {})
        if self.site.kind == "linear":
            tensors = {
                f"{self.site.producer}.weight": gaussian(width, 8),
                f"{self.site.producer}.bias": gaussian(width),
            }
        for name, weight, bias in zip(names, weights, self.biases, strict=True):
            tensors |= {f"{name}.weight": weight.clone(), f"{name}.bias": bias.clone()}
        infos = [LinearInfo(name, *weight.shape, True) for name, weight in zip(names, weights, strict=True)]
        dtypes = dict.fromkeys(tensors, torch.float32)
        self.block = Block(0, "layers.0.", tensors, dtypes, tuple(infos), (self.site,))
        modules = [linear(weight, bias) for weight, bias in zip(weights, self.biases, strict=True)]
        self.owner = Part(*modules) if len(modules) == 2 else modules[0]
        seen = InputStatistics(x.shape[1], ("range", "mean", "tokens", "rows"))
        keys = torch.rand(len(x), generator=torch.Generator().manual_seed(0))
        seen.update(x, tokens=torch.arange(len(x)), keys=keys, body=torch.arange(len(x)) >= skipped)
        self.statistics = BlockStatistics(dict.fromkeys(names, seen))
        inputs = torch.cat((x, torch.zeros(padding, x.shape[1])))[None]
        counts = (torch.arange(len(x) + padding) < len(x))[None] if padding else None
        self.call = Call((inputs,), {}, counts)
        self.notes: list[str] = []

    def situation(self, kind: type[Situation] = Situation) -> Situation:
        observed = Observed(self.statistics, lambda site, tokens: Replay(self.owner, "part.", [self.call]))
        made = situation(
            self.block, self.site.consumers, self.scheme.name, observed=observed, note=self.notes.append,
            weights_of=lambda name: resolve(self.scheme.weights, self.x.shape[1]),
        )  # fmt: skip
        return kind(**vars(made))

    def solve(self, config: os_plus.Config = RECOMMENDED) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """z and s of the signal, and the facts."""
        solution = os_plus.solve(self.situation(), config)
        change = solution.sites.get(self.site.name, SiteChange())
        width = self.x.shape[1] // self.site.repeats
        z = torch.zeros(width) if change.shift is None else change.shift
        s = torch.ones(width) if change.scale is None else change.scale.double().reciprocal().float()
        (fact,) = solution.facts
        return z, s, fact

    def error(self, z: Tensor, s: Tensor) -> float:
        """Squared error of the first linear's output over the output, with everything rounded; written out again."""
        weight, scheme, activations = self.weights[0], resolve(self.scheme.weights, len(s)), self.scheme.activations
        changed = ((self.x - z) / s)[None]
        grid = () if activations.dynamic else grid_over(changed.min(), changed.max(), activations, torch.float32)
        changed = fake_quantize(changed, activations, *grid)[0]
        rounded = rtn.quantize(weight * s, scheme, torch.float32, rtn.Config()).dequantize()
        expected = self.x @ weight.t()
        return float((changed @ rounded.t() + weight @ z - expected).square().sum() / expected.square().sum())


class Exact(Situation):
    """Weights are not rounded."""

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        return weight


# --- what a shift and a scale are ------------------------------------------------------------------------------------


def signal(case: Case, *shifts: os_plus.ShiftKind) -> os_plus.Signal:
    seen = next(iter(case.statistics.inputs.values()))
    return os_plus.Signal(case.site, seen, (seen.minimum, seen.maximum), case.weights, shifts)


def test_midrange_makes_channels_symmetric_and_the_others_are_what_they_are_called():
    x, weight = loud()
    found = signal(Case(x, [weight], "W6A6"), "none", "mean", "median", "percentiles", "midrange").shifts
    moved = x - found["midrange"]
    torch.testing.assert_close(moved.amax(0), -moved.amin(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["mean"], x.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found["median"], x.kthvalue(1 + round(0.5 * 511), dim=0).values)
    middle = (x.quantile(0.01, dim=0, interpolation="nearest") + x.quantile(0.99, dim=0, interpolation="nearest")) / 2
    torch.testing.assert_close(found["percentiles"], middle)
    assert not found["none"].any()


@pytest.mark.parametrize("kind", ["none", "mean", "midrange"])
def test_thresholds_bound_the_signal_and_leave_quiet_channels_alone(kind):
    x, weight = loud()
    found = signal(Case(x, [weight], "W6A6"), kind)
    reach = (x - found.shifts[kind]).abs().amax(0)
    tried = [candidate for candidate in found.candidates() if candidate.form == "threshold"]
    assert len(tried) == 16
    assert tried[0] == found.largest(kind)
    assert bool((found.scale(tried[0]) == 1).all())
    for candidate in [*tried, *found.near(tried[8])]:
        s, t = found.scale(candidate), candidate.value
        assert float(((x - found.shifts[kind]) / s).abs().max()) <= t * (1 + 1e-6)
        assert float(s.min()) >= 1
        assert torch.equal(s == 1, reach <= t)
    assert len(found.near(tried[8])) == 8
    assert all(tried[9].value < candidate.value < tried[7].value for candidate in found.near(tried[8]))


def test_the_released_grid():
    """5.1 of the paper's code: even steps from max|x - z| down to the lower bound, 100 or two per unit."""
    x, weight = loud()
    found = signal(Case(x, [weight], "W6A6"), "midrange")
    grid = [candidate.value for candidate in found.released("midrange", 1.0)]
    assert len(grid) == 101
    assert grid[0] == float(found.reach["midrange"].max())
    assert grid[-1] == pytest.approx(1.0)
    assert grid[0] - grid[1] == pytest.approx(grid[-2] - grid[-1], rel=1e-3)
    assert len(signal(Case(10 * x, [weight], "W6A6"), "none").released("none", 1.0)) > 1200
    assert len(found.released("midrange", 1e6)) == 1


def test_channels_that_are_constant_zero_or_extreme():
    x, weight = loud()
    x[:, 10], x[:, 11], x[:, 12] = 7.3, 0.0, 1e30 * x[:, 12]
    weight[:, 13] = 0
    case = Case(x, [weight], "W6A6")
    found = signal(case, "none", "mean", "median", "percentiles", "midrange")
    for candidate in found.candidates():
        s, z = found.scale(candidate), found.shifts[candidate.shift]
        assert bool((s.isfinite() & (s > 0)).all())
        assert bool(z.isfinite().all())
        assert float(s[11]) == 1
        if candidate.shift in ("median", "percentiles", "midrange"):
            assert float(z[10]) == pytest.approx(7.3)
            assert float(s[10]) == 1
    z, s, fact = case.solve()
    assert bool(z.isfinite().all() and s.isfinite().all())
    assert fact["loss"] <= fact["loss_before"]


def test_a_signal_that_is_all_zero_is_left_alone():
    solution = os_plus.solve(Case(torch.zeros(64, 24), [gaussian(8, 24)], "W6A6").situation(), RECOMMENDED)
    assert not solution.sites


# --- the search ------------------------------------------------------------------------------------------------------


def test_without_rounding_every_candidate_is_exact_and_none_is_taken():
    """W * s, (x - z) / s and b + W @ z belong together: with weights of full precision nothing is lost."""
    x, weight = loud(128)
    case = Case(x, [weight, gaussian(256, 256, seed=5)], "W8A16", biases=[gaussian(256), gaussian(256, seed=1)])
    found = case.situation(Exact)
    search = os_plus._Search(found, found.observed, case.site, case.site.consumers, RECOMMENDED, shift=True)
    samples = search._samples()
    for candidate in search.signal.candidates()[::7]:
        assert search._loss(candidate) < 1e-9
        assert search._screen(candidate, samples) < 1e-9
    assert not os_plus.solve(found, os_plus.Config(candidates=2)).sites


@pytest.mark.parametrize("scheme", ["W6A6", "W4A4T", "W6A6Z", "W6A6TS", "W6A6ZTS", "W4A4B32"])
def test_the_loss_is_what_the_runtime_rounds(scheme):
    """The recorded losses are those of an independent computation, for the identity and for what was chosen."""
    x, weight = loud(96, 64, 48)
    case = Case(x, [weight], scheme)
    z, s, fact = case.solve()
    assert case.error(torch.zeros(64), torch.ones(64)) == pytest.approx(fact["loss_before"], rel=1e-3)
    assert case.error(z, s) == pytest.approx(fact["loss"], rel=1e-3)


def test_a_static_range_that_cuts_off_tokens_is_searched_as_such():
    """One token in 400 is far out: a range over 99 % of them does without it, so that it alone loses."""
    x, weight = loud(400, 64, 48)
    x[3] *= 20
    case = Case(x, [weight], "W6A6TS")
    scheme = case.scheme.model_copy(
        update={"activations": case.scheme.activations.model_copy(update={"quantile": 0.99})}
    )
    (fact,) = os_plus.solve(Situation(**(vars(case.situation()) | {"scheme": scheme})), SCALE_ONLY).facts
    reach = x.abs().amax(1).kthvalue(1 + round(0.99 * 399)).values
    grid = grid_over(-reach, reach, scheme.activations, torch.float32)
    rounded = rtn.quantize(weight, resolve(scheme.weights, 64), torch.float32, rtn.Config()).dequantize()
    expected = x @ weight.t()
    error = fake_quantize(x, scheme.activations, *grid) @ rounded.t() - expected
    assert fact["loss_before"] == pytest.approx(float(error.square().sum() / expected.square().sum()), rel=1e-3)


@pytest.mark.parametrize("scheme", ["W6A6", "W4A4T", "W8A8TS", "W4A16G32", "W3ZA16G64"])
@pytest.mark.parametrize("config", [RECOMMENDED, SCALE_ONLY, os_plus.Config(candidates=1)], ids=str)
@pytest.mark.parametrize("outliers", [True, False])
def test_never_worse_than_leaving_the_signal_alone(scheme, config, outliers):
    x, weight = loud(96, 64, 48) if outliers else (gaussian(96, 64), gaussian(48, 64, seed=1))
    _, s, fact = Case(x, [weight, gaussian(48, 64, seed=3)], scheme).solve(config)
    assert fact["loss"] <= fact["loss_before"]
    assert fact["scale_min"] == pytest.approx(float(s.min()))
    if outliers and "A16" not in scheme:
        assert fact["loss"] < 0.6 * fact["loss_before"]


@pytest.mark.parametrize("scheme", ["W6A6", "W4A4T", "W8A8TS", "W4A16G32"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_shift_to_choose_is_no_loss(scheme, seed):
    """There are five times as many candidates to screen; what is good without a shift must not get lost."""
    x, weight = loud(96, 64, 48) if seed else (gaussian(96, 64), gaussian(48, 64, seed=1))
    case = Case(x, [weight, gaussian(48, 64, seed=3)], scheme)
    (_, _, both), (_, _, scale) = case.solve(), case.solve(SCALE_ONLY)
    assert both["loss"] <= 1.01 * scale["loss"]


def test_first_tokens_count_where_they_share_the_grid():
    """Statistics leave them out. With one grid for all tokens a massive one has to be brought down; else it has not."""
    x = gaussian(256, 64)
    x[0, 9] = 300
    found = {}
    for scheme in ("W6A6T", "W6A6TS", "W6A6"):
        case = Case(x, [gaussian(48, 64, seed=1)], scheme, skipped=1)
        z, s, found[scheme] = case.solve()
        assert case.error(z, s) == pytest.approx(found[scheme]["loss"], rel=1e-3)
        if scheme != "W6A6":
            assert found[scheme]["loss"] < 0.1 * found[scheme]["loss_before"]
    assert found["W6A6T"]["scale_max"] > 20 > 3 > found["W6A6"]["scale_max"]


@pytest.mark.parametrize("scheme", ["W6ZA6Z", "W6ZA6T"])
def test_shift_and_scale_win_on_shifted_outliers(scheme):
    """Errors fall from nothing over SmoothQuant and scale alone to both, the last by more than three times."""
    x, weight = loud()
    case = Case(x, [weight], scheme)
    ones, zeros = torch.ones(256), torch.zeros(256)
    smooth = smoothquant.smoothing_scale(x.abs().amax(0), weight.abs().amax(0), 0.5)
    none, half = case.error(zeros, ones), case.error(zeros, smooth)
    scale, both = (case.error(*case.solve(config)[:2]) for config in (SCALE_ONLY, RECOMMENDED))
    assert none > half > scale > 3 * both


def test_few_extreme_tokens_do_not_decide_the_shift_per_token():
    """Midrange would move every token for the sake of one; for one grid per tensor it is what helps."""
    x, weight = loud()
    x[0, 4], x[0, 5] = 200, -150
    case = Case(x, [weight], "W6ZA6Z")
    z, s, fact = case.solve()
    assert fact["shift"] != "midrange"
    midrange, faithful, _ = case.solve(FAITHFUL)
    assert case.error(z, s) < 0.5 * case.error(midrange, faithful)


def test_channels_may_come_in_any_order():
    x, weight = loud(128, 64, 48)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    z, s, fact = Case(x, [weight], "W6A6").solve()
    moved_z, moved_s, moved_fact = Case(x[:, order], [weight[:, order]], "W6A6").solve()
    torch.testing.assert_close(moved_z, z[order])
    torch.testing.assert_close(moved_s, s[order], rtol=1e-5, atol=0)
    assert {**moved_fact, "loss": 0, "loss_before": 0} == pytest.approx({**fact, "loss": 0, "loss_before": 0})


def test_padding_changes_nothing():
    x, weight = loud(128, 64, 48)
    z, s, fact = Case(x, [weight], "W6A6").solve()
    padded_z, padded_s, padded = Case(x, [weight], "W6A6", padding=40).solve()
    assert torch.equal(padded_z, z)
    assert torch.equal(padded_s, s)
    assert {**padded, "loss": 0, "loss_before": 0} == {**fact, "loss": 0, "loss_before": 0}
    assert padded["loss"] == pytest.approx(fact["loss"], rel=1e-4)


def test_a_constant_moves_the_shift_and_nothing_else():
    x, weight = loud(128, 64, 48)
    c = torch.randint(-9, 10, (64,), generator=torch.Generator().manual_seed(4)).float()
    z, s, fact = Case(x, [weight], "W6A6").solve(FAITHFUL)
    bias = -(weight @ c)
    moved_z, moved_s, moved = Case(x + c, [weight], "W6A6", biases=[bias]).solve(FAITHFUL)
    torch.testing.assert_close(moved_z, z + c, rtol=0, atol=1e-4)
    torch.testing.assert_close(moved_s, s, rtol=1e-4, atol=0)
    assert moved["threshold"] == pytest.approx(fact["threshold"], rel=1e-4)
    assert moved["loss"] == pytest.approx(fact["loss"], rel=0.02)


def test_a_shift_needs_biases_and_says_so_once():
    x, weight = loud(96, 64, 48)
    case = Case(x, [weight], "W6A6", norm_bias=False)
    z, _, fact = case.solve()
    assert not z.any()
    assert fact["shift"] == "none"
    assert case.notes == ["os-plus scales without a shift where one cannot be folded: norm has no bias."]
    quiet = Case(x, [weight], "W6A6", norm_bias=False)
    quiet.solve(SCALE_ONLY)
    assert not quiet.notes


def test_an_expert_that_few_tokens_reached_is_left_alone():
    x, weight = loud(20, 64, 48)
    case = Case(x, [weight], "W6A6")
    assert os_plus.solve(case.situation(), RECOMMENDED) == Solution()
    assert len(case.notes) == 1


def test_heads_that_share_a_value_head_share_shift_and_scale():
    """Two key/value heads, three query heads each, four channels: the loudest of the three decides."""
    site = Site("attention.value", "linear", "v", ("part",), repeats=3, head_dim=4)
    x = gaussian(256, 24) + 20 * (torch.arange(24) % 12 == 1)
    x[:, 5] *= 30  # kv head 0, query head 1, channel 1
    case = Case(x, [gaussian(40, 24, seed=1)], "W6A6", site=site)
    z, s, _ = case.solve(os_plus.Config())
    assert len(z) == len(s) == 8
    reach = signal(case, "none").reach["none"]
    assert torch.equal(reach, x.abs().amax(0).view(2, 3, 4).amax(1).flatten())
    assert int(s.argmax()) == 1
    before = (case.block.weight("part").clone(), case.block.tensors["part.bias"].clone())
    state = Transformed(case.block, ["v", "part"], torch.float32, lambda text: None)
    state.apply("os-plus", Solution({site.name: SiteChange(s.double().reciprocal(), z)}))
    columns_z, columns_s = (value.view(2, 1, 4).expand(2, 3, 4).flatten() for value in (z, s))
    after = ((x - columns_z) / columns_s) @ case.block.weight("part").t() + case.block.tensors["part.bias"]
    torch.testing.assert_close(after, x @ before[0].t() + before[1], rtol=1e-4, atol=1e-2)


def test_the_faithful_preset_transforms_what_the_released_code_does():
    block = Case(*(part if index == 0 else [part] for index, part in enumerate(loud())), "W6A6").block
    value = Site("attention.value", "linear", "v", ("o",), head_dim=4)
    hidden = Site("mlp.hidden", "linear", "up", ("down",))
    assert os_plus._released(block, NORM)
    assert not os_plus._released(block, value)
    assert not os_plus._released(block, hidden)
    del block.tensors["norm.bias"]
    assert os_plus._released(block, hidden)
    assert not os_plus._released(block, value)


# --- from source folder to reloaded checkpoint -----------------------------------------------------------------------


def facts(folder: Path) -> list[dict[str, Any]]:
    return [fact for event in read_record(folder / "quantkit-run.jsonl") for fact in event.get("transforms", ())]


@pytest.mark.parametrize("name", TINY)
def test_reloads_and_computes_what_the_codes_say(source, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    recipe = {"scheme": "W6A6", "steps": [{"method": "os-plus", "options": {"candidates": 2}}, "rtn"]}
    quantkit.quantize(str(source(name)), output=out, recipe=recipe, calibration=CALIBRATION)
    original = fresh_logits.logits_of("quantkit", source(name))
    rounded = fresh_logits.logits_of("quantkit", out)
    assert float((rounded - original).norm() / original.norm()) < 0.3  # in mixtures tokens change experts
    # The decoded float model does not round activations.
    monkeypatch.setattr(reference, "fake_quantize", lambda x, *_: x)
    expected = fresh_logits.logits_of("in-process", dense_copy(out, tmp_path / "dense"))
    found = fresh_logits.logits_of("quantkit", out)
    assert not torch.equal(found, rounded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(fact["loss"] <= fact["loss_before"] for fact in facts(out))
    assert sum(fact["loss"] for fact in facts(out)) < 0.95 * sum(fact["loss_before"] for fact in facts(out))
    shifted = {fact["site"] for fact in facts(out) if fact["shift"] != "none"}
    with_shift = {"opt", "bloom", "gpt_neox", "bert", "bert_classifier"}
    assert ("attention.input" in shifted or "mlp.input" in shifted) == (name in with_shift)


def test_a_stopped_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    steps = [{"method": "os-plus", "options": {"candidates": 2}}, "rtn"]
    request = {"recipe": {"scheme": "W4A8", "steps": steps}, "calibration": CALIBRATION}
    quantkit.quantize(str(source("opt")), output=tmp_path / "whole", **request)
    write = writer.CheckpointWriter.write_shard

    def stop_at_the_second_block(self, key, *rest):
        if key == "block 1":
            raise KeyboardInterrupt
        write(self, key, *rest)

    monkeypatch.setattr(writer.CheckpointWriter, "write_shard", stop_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(str(source("opt")), output=tmp_path / "stopped", **request)
    monkeypatch.undo()
    quantkit.quantize(str(source("opt")), output=tmp_path / "stopped", resume=True, **request)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
