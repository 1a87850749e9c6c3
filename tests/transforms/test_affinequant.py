"""AffineQuant: matrices leave the function, are where they were announced, and help where factors cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fresh_logits
import pytest
import torch
from folded import Folded
from looked import CALIBRATION, check_reload, facts_of
from opened import sample_ids
from safetensors.torch import load_file, save_file
from taught import Taught, check_resumed, scatter, taught
from test_pipeline import fresh
from tiny_models import TINY
from torch import Tensor

import quantkit
from quantkit.errors import RecipeError
from quantkit.formats.inspect import inspect_checkpoint
from quantkit.formats.layer import LayerFormat
from quantkit.layers.simulate import simulate_inputs
from quantkit.learn import block, loop
from quantkit.learn.affine import AffineChanges
from quantkit.models.stream import BlockStream
from quantkit.pipeline import prepare
from quantkit.plan import Plan
from quantkit.recipe import Recipe, WeightScheme
from quantkit.transforms import affinequant
from quantkit.transforms.affinequant import Config
from quantkit.transforms.apply import Transformed
from quantkit.transforms.interface import Solution

Source = Callable[[str], Path]
DENSE: dict[str, Any] = {"norm_transform": "dense_online"}
ANY = LayerFormat(weights=WeightScheme(bits=4, group_size=-1, symmetric=True))


# --- the function stays ----------------------------------------------------------------------------------------------


def in_float64(solution: Solution, model: Folded) -> Solution:
    """Without limits; powers of two where a norm computes in float32 whatever the model's dtype."""
    sites = {}
    norms = {site.name for site in model.block(0).sites if site.kind == "norm"}
    for name, change in solution.sites.items():
        assert change.scale is not None
        exact = change.scale.log2().round().exp2() if model.in_float32 and name in norms else change.scale
        sites[name] = replace(change, scale=exact)
    return replace(solution, sites=sites, limits={})


def output_of(model: Folded, solution: Solution) -> Tensor:
    """What block 0 makes of samples behind ``solution``, in float64."""
    stream = BlockStream(model.skeleton, model.checkpoint, torch.float64)
    captured = stream.capture(sample_ids(padded=False)[0])
    own, linears = model.block(0), [info.name for info in model.skeleton.linears(0)]
    state = Transformed(own, linears, torch.float64, pytest.fail)
    state.apply("affinequant", solution)
    module = model.skeleton.build_block(0, own.tensors, torch.float64)
    simulate_inputs(module, dict.fromkeys(state.inputs, ANY), state.inputs, model.skeleton.expert_names)
    # BLOOM's softmax is in float32 whatever the dtype: its rows sum to 1 up to 1e-7, and shifted values show that.
    with patch("torch.nn.functional.softmax", lambda x, dim=None, **_: torch.softmax(x, dim)):
        return stream.run_block(module, captured.hidden, 0, captured)


@pytest.mark.parametrize("options", [{}, {"parameterisation": "masked", **DENSE}], ids=["folded", "online"])
@pytest.mark.parametrize("name", TINY)
def test_whatever_is_learned_leaves_the_function(
    source: Source, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """Every number is drawn at random; float64, so that only the algebra is tested."""
    monkeypatch.setattr(block, "train", scatter)
    with taught(source(name), "W4A4", affinequant) as lesson:
        looked = lesson.looked
        solution = lesson.solve(query_key=True, clip=False, **options)
        sites = {site.name: site for site in looked.block.sites}
        assert set(solution.matrices) == {"attention.value"}
        dense = {path for at in ("attention.input", "mlp.input") for path in sites[at].consumers}
        assert set(solution.ops) == (dense & set(looked.linears) if options else set())
        made = looked.block.weight(sites["attention.value"].producer)
        values = len(made) if sites["attention.value"].rows is None else len(sites["attention.value"].rows)
        width = sites["attention.value"].head_dim
        assert solution.matrices["attention.value"].shape == (values // width, width, width)
        announced = affinequant.online(sites.values(), looked.linears, Config(**options))
        assert {path for path, ops in announced.items() if "dense" in ops} == set(solution.ops)
    model = Folded(source(name))
    changed = in_float64(solution, model)
    before, after = output_of(model, Solution()), output_of(model, changed)
    assert float((after - before).norm() / before.norm()) < 1e-10
    for matrices in solution.matrices.values():
        assert float((matrices - torch.eye(width)).abs().max()) > 0.01


@pytest.mark.parametrize("missing", ["self_attn.v_proj", "self_attn.o_proj"])
def test_values_are_left_where_v_or_o_is_not_quantised(source: Source, missing: str) -> None:
    with taught(source("llama"), "W4A4", affinequant) as lesson:
        looked = lesson.looked
        looked.situation = replace(looked.situation, linears=[name for name in looked.linears if name != missing])
        assert not lesson.solve().matrices


# --- against omniquant -----------------------------------------------------------------------------------------------

NOTHING: list[dict[str, Any]] = [
    {"stability": 0.0},
    {"stability": 0.0, **DENSE},
    {"value_transform": "diag"},
]


@pytest.mark.parametrize("scheme", ["W4A4Z", "W3A16G32"])
def test_without_matrices_it_is_omniquant(source: Source, scheme: str) -> None:
    with taught(source("opt"), scheme) as lesson:
        want = lesson.solve(query_key=True)
    assert want.facts[0]["accepted"]
    for options in NOTHING:
        with taught(source("opt"), scheme, affinequant) as lesson:
            found = lesson.solve(query_key=True, **options)
        assert found.facts == want.facts
        assert not found.matrices
        assert not found.ops
        assert found.sites.keys() == want.sites.keys()
        for name, change in want.sites.items():
            for one, other in ((found.sites[name].scale, change.scale), (found.sites[name].shift, change.shift)):
                assert one is other is None or torch.equal(one, other)
        assert found.limits.keys() == want.limits.keys()
        assert all(all(map(torch.equal, found.limits[name], limits)) for name, limits in want.limits.items())


def test_matrices_that_learn_nothing_are_none(source: Source) -> None:
    """A band of width 1 throughout: the block is folded through identities."""
    with taught(source("llama"), "W4A4Z") as lesson:
        want = lesson.solve().facts[0]
    with (
        taught(source("llama"), "W4A4Z", affinequant) as lesson,
        patch.object(AffineChanges, "begin_epoch", lambda *_: True),
    ):
        solution = lesson.solve(**DENSE)
    assert solution.facts[0]["loss"] == pytest.approx(want["loss"], rel=1e-3)
    assert all(torch.equal(matrix, torch.eye(16).expand(2, -1, -1)) for matrix in solution.matrices.values())
    assert all(torch.equal(op.matrix, torch.eye(64)) for op in solution.ops.values())


@pytest.fixture(scope="module")
def correlated(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All values of a head have a large part in common, which what reads them hardly looks at."""
    folder = tmp_path_factory.mktemp("correlated") / "llama"
    shutil.copytree(source("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        made, read = (f"model.layers.{index}.self_attn.{name}_proj.weight" for name in "vo")
        heads, by_head = tensors[made].unflatten(0, (2, 16)), tensors[read].unflatten(1, (4, 16))
        common = torch.randn(2, 1, heads.shape[-1], generator=generator)
        tensors[made] = (0.2 * heads + 0.3 * common).flatten(0, 1).contiguous()
        tensors[read] = (4 * (by_head - 0.95 * by_head.mean(-1, keepdim=True))).flatten(1).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


VALUES = ("self_attn.v_proj", "self_attn.o_proj")


def only_values(lesson: Taught) -> None:
    """Round v and o alone."""
    block, looked = lesson.looked.block, lesson.looked
    block.linears = tuple(info for info in block.linears if info.name in VALUES)
    looked.situation = replace(looked.situation, linears=looked.linears)


@pytest.mark.parametrize("options", [{}, {"parameterisation": "masked"}], ids=["dominant", "masked"])
@pytest.mark.parametrize("scheme", ["W3A16", "W4A4"])
def test_matrices_help_where_factors_cannot(correlated: Path, scheme: str, options: dict[str, Any]) -> None:
    found = []
    for stability in (0.0, 1.0):
        with taught(correlated, scheme, affinequant) as lesson:
            only_values(lesson)
            found.append(lesson.solve(epochs=10, let="always", stability=stability, **options))
    diagonal, mixed = (solution.facts[0] for solution in found)
    assert mixed["loss"] < 0.7 * diagonal["loss"] < diagonal["loss"] < mixed["loss_before"]


# --- what is learned is what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("llama", "W4A4Z", {}),
        ("phi3", "W3A16G32", {"let": "always"}),
        ("opt", "W4A4Z", {"query_key": True, **DENSE}),
        ("bert", "W4A4Z", DENSE),
        ("mixtral", "W3A16G32", DENSE),
        ("gemma2", "W4A6Z", {"parameterisation": "masked", "stability": 1.0}),
    ],
    ids=str,
)
def test_what_is_simulated_is_what_is_saved(source: Source, name: str, scheme: str, options: dict[str, Any]) -> None:
    with taught(source(name), scheme, affinequant) as lesson:
        target = lesson.looked.outputs(None)
        solution = lesson.solve(epochs=4, opening=0.0, **options)
        fact = solution.facts[0]
        assert fact["accepted"]
        assert fact["loss"] < fact["loss_before"]
        assert fact["learning"]["best_epoch"] > 0
        mixed = [found for found in solution.facts if "dominance" in found]
        assert len(mixed) == (3 if options.keys() >= DENSE.keys() else 1)
        for found in mixed:
            assert 0.1 - 1e-5 <= found["dominance"] < 1 or "parameterisation" in options
            assert 1 < found["condition"] < 19
        _, judges = loop.split(range(CALIBRATION["nsamples"]), 0.25, seed=0)
        module = lesson.carry_out(solution)
        assert lesson.loss(module, target, judges) == pytest.approx(fact["loss"], rel=1e-3)


def test_the_best_epoch_is_saved_with_its_band(correlated: Path) -> None:
    """What the last epoch begins with is ruined: the second one is the best."""
    begin = AffineChanges.begin_epoch

    def spoil(self: AffineChanges, epoch: int, epochs: int) -> bool:
        settled = begin(self, epoch, epochs)
        for group in self.groups() if epoch == 2 else ():
            for parameter in group.parameters:
                parameter.data.mul_(-50)
        return settled

    with taught(correlated, "W4A16", affinequant) as lesson:
        only_values(lesson)
        target = lesson.looked.outputs(None)
        with patch.object(AffineChanges, "begin_epoch", spoil):
            solution = lesson.solve(epochs=3, opening=1.0, schedule="constant")
        fact = solution.facts[0]
        assert fact["learning"]["best_epoch"] == 2
        undo = torch.linalg.inv(solution.matrices["attention.value"]).mT
        distance = (torch.arange(16)[:, None] - torch.arange(16)).abs()
        assert float(undo[:, distance >= 8].abs().max()) < 1e-12
        assert float(undo[:, distance == 7].abs().max()) > 1e-3
        _, judges = loop.split(range(CALIBRATION["nsamples"]), 0.25, seed=0)
        assert lesson.loss(lesson.carry_out(solution), target, judges) == pytest.approx(fact["loss"], rel=1e-3)


def test_patience_waits_for_the_whole_matrix(source: Source) -> None:
    with taught(source("llama"), "W4A4Z", affinequant) as lesson:
        stuck = {"lr_let": 9.0, "lr_clip": 9.0, "lr_matrix": 9.0, "patience": 1}
        for opening, epochs in ((1.0, 6), (0.5, 3), (0.0, 1)):
            curve = lesson.solve(epochs=6, opening=opening, **stuck).facts[0]["learning"]
            assert curve["best_epoch"] == 0
            assert len(curve["train"]) == epochs


def test_the_same_seed_learns_the_same(source: Source) -> None:
    found = []
    for seed in (0, 0, 1):
        with taught(source("llama"), "W4A4", affinequant) as lesson:
            lesson.looked.situation = replace(lesson.looked.situation, seed=seed)
            found.append(lesson.solve(clip=False))
    first, second, third = found
    assert first.facts == second.facts != third.facts
    assert torch.equal(first.matrices["attention.value"], second.matrices["attention.value"])
    assert not torch.equal(first.matrices["attention.value"], third.matrices["attention.value"])


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_authors_recipe() -> None:
    config = Config(preset="faithful", epochs=40)
    assert (config.epochs, config.batch, config.schedule, config.opening) == (40, 1, "constant", 1.0)
    assert (config.parameterisation, config.clip_start, config.let, config.aug_loss) == (
        "masked",
        "wide",
        "always",
        False,
    )
    assert (config.lr_let, config.lr_matrix, config.lr_clip) == (5e-3, 5e-3, 1e-2)
    assert [config.stability_of(rounds) for rounds in (False, True)] == [0.01, 0.1]
    assert [Config().stability_of(rounds) for rounds in (False, True)] == [1.0, 1.0]
    assert Config(preset="faithful", stability=0.3).stability_of(False) == 0.3


def test_the_authors_recipe_runs(source: Source) -> None:
    with taught(source("opt"), "W3A16G32", affinequant) as lesson:
        config = Config(preset="faithful", norm_transform="dense_online", epochs=2, target="quantised")
        solution = affinequant.solve(lesson.looked.situation, config)
    fact = solution.facts[0]
    assert fact["judged_by"] == fact["learned_from"] == CALIBRATION["nsamples"]
    assert fact["learning"]["steps"] == 2 * CALIBRATION["nsamples"]
    assert {len(found) for found in (solution.matrices, solution.sites)} == {1, 4}
    assert len(solution.ops) == 4


def plan_of(folder: Path, scheme: str, form: str = "auto", **options: Any) -> Plan:
    steps = [{"method": "affinequant", "options": options}, {"method": "rtn"}]
    recipe = {"scheme": scheme, "steps": steps, "format": form}
    return prepare(str(folder), Recipe.model_validate(recipe))[0]


def test_nothing_runs_online_unless_it_is_asked_for(source: Source) -> None:
    folder = source("llama")
    for scheme in ("W4A16GC", "W8A8"):
        assert plan_of(folder, scheme, "compressed-tensors").format == "compressed-tensors"
    for layer in plan_of(folder, "W4A4").layers:
        assert layer.format is not None
        assert (layer.format.input_op, layer.format.input_scale, layer.format.input_shift) == ("none", False, False)


def test_a_matrix_at_run_time_is_refused_by_a_format_that_cannot_hold_it(source: Source) -> None:
    with pytest.raises(RecipeError, match=r"compressed-tensors cannot hold this result: .*matrix \(dense\)"):
        plan_of(source("llama"), "W4A16GC", "compressed-tensors", **DENSE)
    found = plan_of(source("llama"), "W4A16GC", **DENSE)
    assert found.format == "quantkit"
    mixed = [layer.name for layer in found.layers if layer.format and layer.format.input_op == "dense"]
    assert len(mixed) == 2 * 5
    assert not any(name.endswith(("o_proj", "down_proj")) for name in mixed)


# --- whole models ----------------------------------------------------------------------------------------------------

SAMPLES = {"nsamples": 9, "seqlen": 16, "batch_size": 4}


def request(scheme: str, *before: dict[str, Any], **options: Any) -> dict[str, Any]:
    learned = {"method": "affinequant", "options": {"epochs": 1, "opening": 0.0} | options}
    steps = [*before, learned, {"method": "rtn"}]
    return {"recipe": {"scheme": scheme, "steps": steps}, "calibration": SAMPLES}


@pytest.mark.parametrize("scheme", ["W3A16G32", "W4A4"])
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reloads(source: Source, tmp_path: Path, name: str, scheme: str) -> None:
    out = tmp_path / "out"
    quantkit.quantize(str(source(name)), output=out, **request(scheme))
    if scheme == "W3A16G32":
        check_reload(out, tmp_path / "dense")  # dense copies do not round inputs; that runs did is checked by runs
    blocks = [fact for fact in facts_of(out) if "learning" in fact]
    assert len(blocks) == 2
    assert all(0 < fact["loss"] <= fact["loss_before"] for fact in blocks)
    assert all(fact["learning"]["skipped_steps"] == 0 for fact in blocks)


def test_a_fresh_process_computes_the_same(source: Source, tmp_path: Path) -> None:
    """Matrices at run time among them."""
    runs = {"llama": request("W4A4"), "opt": request("W3A16G32", **DENSE), "qwen3_moe": request("W4A4", **DENSE)}
    for name, asked in runs.items():
        quantkit.quantize(str(source(name)), output=tmp_path / name, **asked)
    found = fresh("quantkit", [tmp_path / name for name in runs], tmp_path / "logits.safetensors")
    for name in runs:
        assert torch.equal(found[name], fresh_logits.logits_of("quantkit", tmp_path / name)), name


def test_what_a_matrix_costs_is_shown(source: Source, tmp_path: Path) -> None:
    for name, options in (("free", {}), ("dense", DENSE)):
        quantkit.quantize(str(source("llama")), output=tmp_path / name, **request("W3A16G32", **options))
    free, dense = (inspect_checkpoint(tmp_path / name) for name in ("free", "dense"))
    assert free.online_share == 0
    assert {layer.format.input_op for layer in free.layers} == {"none"}
    costs = {layer.name.rpartition(".")[2]: layer.online_operations for layer in dense.layers}
    assert costs == dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 2 * 64**2) | {
        "o_proj": 0, "down_proj": 0,
    }  # fmt: skip
    sizes = [sum(layer.stored_bytes for layer in report.layers) for report in (free, dense)]
    assert sizes[1] - sizes[0] == 2 * 5 * 64**2 * 4


def test_the_portable_format_holds_nothing_more(source: Source, tmp_path: Path) -> None:
    quantkit.quantize(str(source("llama")), output=tmp_path / "mixed", **request("W4A16GC"))
    quantkit.quantize(str(source("llama")), output=tmp_path / "plain", method="rtn", scheme="W4A16GC")
    assert any("dominance" in fact for fact in facts_of(tmp_path / "mixed"))
    check_reload(tmp_path / "mixed", tmp_path / "dense")
    mixed, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "plain"))
    assert {name: t.shape for name, t in mixed.items()} == {name: t.shape for name, t in plain.items()}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("mixed", "plain")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_transform_before_it(source: Source, tmp_path: Path) -> None:
    """SINQ scales the input of o at run time, between the values and the weight: no matrix is learned there."""
    out, before = tmp_path / "out", {"method": "sinq", "options": {"absorb": "never"}}
    quantkit.quantize(str(source("mistral")), output=out, **request("W3A16G32", before, **DENSE))
    check_reload(out, tmp_path / "dense")
    assert {fact["site"] for fact in facts_of(out) if "dominance" in fact} == {"attention.input", "mlp.input"}


def test_a_stopped_run_goes_on_to_the_same_bytes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resumed(source("opt"), tmp_path, monkeypatch, **request("W4A4", **DENSE))
