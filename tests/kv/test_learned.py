"""What is learned about a block is learned with its keys and values rounded, and some of it about these."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fresh_logits
import pytest
import torch
from looked import CALIBRATION, save_source
from safetensors.torch import load_file, save_file
from taught import check_resumed
from test_pipeline import fresh
from tiny_models import CAUSAL, TINY, load_tiny, make_tiny, save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

import quantkit
from quantkit import ahead
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.inspect import inspect_checkpoint
from quantkit.formats.kv import KVFormat, LearnedKV
from quantkit.formats.writer import RUN_RECORD, read_record
from quantkit.kv.attach import attentions, key_dim, kv_hooks, quantise_kv
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.quantiser import MinMax
from quantkit.learn import block, loop
from quantkit.learn.keys import caches_of
from quantkit.learn.matrices import Matrix
from quantkit.pipeline import prepare
from quantkit.presets import expand

Source = Callable[[str], Path]
OPTIONS = {"epochs": 2, "holdout": 0.25, "target": "quantised"}
KV4 = KVFormat(bits=4, symmetric=False, clip=1.0, key_transform="hadamard", seed=0).to_be_learned()
QUICK = {"nsamples": 6, "seqlen": 12, "batch_size": 3}
ONLY_KEYS = {"matrices": False, "diagonal": False, "weight_clip": False, "activation_clip": False}
PROMPT = fresh_logits.PROMPT


def facts(folder: Path, key: str) -> list[dict[str, Any]]:
    """Lines about the transforms of the blocks that have ``key``."""
    events = [event for event in read_record(folder / RUN_RECORD) if "block" in event]
    return [fact for event in events for fact in event["transforms"] if key in fact]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rounded_keys_and_values_are_part_of_the_error_that_is_learned_away(tmp_path: Path, name: str) -> None:
    found = {}
    for kv in ("", "KV2"):
        recipe = {
            "scheme": f"W8A8{kv}",
            "steps": [{"method": "omniquant", "options": OPTIONS}, "rtn"],
            "calibration": CALIBRATION,
        }
        quantkit.quantize(str(save_source(name, tmp_path)), output=tmp_path / f"out{kv}", recipe=recipe)
        found[kv] = facts(tmp_path / f"out{kv}", "loss_before")
    for plain, rounded in zip(found[""], found["KV2"], strict=True):
        assert rounded["loss_before"] > 3 * plain["loss_before"]
        assert rounded["loss"] <= rounded["loss_before"]
    assert any(fact["accepted"] for fact in found["KV2"])


# --- what attention is handed ----------------------------------------------------------------------------------------


def float64(name: str) -> PreTrainedModel:
    model = make_tiny(TINY[name]()).double()
    if "moe" in name or name == "mixtral":
        model.set_experts_implementation("eager")  # the other one has no float64
    return model


def something(model: PreTrainedModel) -> dict[str, LearnedKV]:
    """For every attention, far from orthogonal."""
    generator, found = torch.Generator().manual_seed(0), {}
    for one in attentions(model):
        dim = key_dim(one.module)
        clips = 0.7 + 0.3 * torch.rand(2, 2, generator=generator, dtype=torch.float64)
        matrix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) + 3 * torch.eye(dim)
        found[one.path] = LearnedKV(clips[0], clips[1], matrix)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_scores_stay_what_they_are_but_for_the_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rounded = float64(name), []
    output = model(PROMPT)
    learned = something(model)
    quantise_kv(model, KV4, learned)

    def leave(method: MinMax, states: Tensor) -> Tensor:
        rounded.append((states, method))
        return states

    monkeypatch.setattr(MinMax, "round", leave)
    torch.testing.assert_close(model(PROMPT, use_cache=False).logits, output.logits, rtol=1e-9, atol=1e-9)
    first, layer = next(iter(learned.values())), output.past_key_values.layers[0]
    assert first.key_matrix is not None
    (keys, of_keys), (values, of_values) = rounded[:2]
    seen = layer.keys.shape[-2]  # a window may keep less
    torch.testing.assert_close(keys[:, :, -seen:], layer.keys @ first.key_matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values[:, :, -seen:], layer.values, rtol=1e-9, atol=1e-9)
    assert torch.stack((of_keys.low, of_keys.high)).equal(first.key_clip)
    assert torch.stack((of_values.low, of_values.high)).equal(first.value_clip)


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_gives_what_a_forward_without_one_gives(name: str) -> None:
    model = float64(name)
    plain = model(PROMPT, use_cache=False).logits
    quantise_kv(model, KV4, something(model))
    full = model(PROMPT, use_cache=False).logits
    assert (full - plain).abs().max() > 1e-3 * plain.abs().max()
    for split in ([1] * 8, [5, 1, 2]):
        cache, logits = None, []
        for part in PROMPT.split(split, dim=1):
            step = model(part, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=1e-9, atol=1e-9)


def test_what_an_attention_holds_may_move_and_change() -> None:
    model = float64("llama")
    quantise_kv(model, KV4, something(model))
    one = attentions(model)[0]
    hook = kv_hooks(model)[one.path]
    first = hook.layer_kv(one.module)
    assert hook.layer_kv(one.module) is first
    model.float()
    second = hook.layer_kv(one.module)
    assert second is not first
    assert [t.dtype for t in second.transform.tensors()] == [torch.float32, torch.float64]  # and its inverse
    changed = {name: 1.5 * t for name, t in model.state_dict().items() if name.endswith("key_matrix")}
    model.load_state_dict(changed, strict=False)
    third = hook.layer_kv(one.module)
    assert torch.equal(next(iter(third.transform.tensors())), changed[f"{one.path}.key_matrix"])


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "dense"])
def test_gradients_reach_all_that_is_learned(transform: str) -> None:
    model = make_tiny(TINY["qwen3"]())
    kv = KV4.model_copy(update={"key_transform": transform, "bits": 3})
    quantise_kv(model, kv, something(model))
    layer = model.model.layers[0]
    (cache,) = caches_of(layer, lambda _: lambda size: Matrix(torch.eye(size)[None], "direct"))
    cache.use()
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    turns = model.model.rotary_emb(hidden, torch.arange(9)[None])
    layer(hidden, position_embeddings=turns).square().sum().backward()
    assert bool((cache.shares.grad != 0).all())
    assert (cache.matrix is None) == (transform == "none")
    if cache.matrix is not None:
        assert bool((cache.matrix.entries.grad != 0).any(dim=(1, 2)).all())
    assert (cache.learned().key_matrix is None) == (transform == "none")
    cache.leave()
    assert kv_hooks(layer)["self_attn"].trial is None


def request(scheme: str, *following: str, **options: Any) -> dict[str, Any]:
    steps = [{"method": "flatquant", "options": {"epochs": 1} | options}, *({"method": name} for name in following)]
    return {"recipe": {"scheme": scheme, "steps": steps}, "calibration": QUICK}


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few channels of keys that are much larger than the others; its queries make up for them."""
    folder = tmp_path_factory.mktemp("outliers")
    save_tiny("llama", folder, vocab_size=VOCABULARY, head_dim=32)
    save_tokenizer(folder)
    model = load_tiny(folder)
    pair = torch.tensor([5, 21])  # of the rotary embedding
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for linear, factor in ((attention.k_proj, 12.0), (attention.q_proj, 1 / 12)):
                rows = (torch.arange(0, len(linear.weight), 32)[:, None] + pair).flatten()
                linear.weight[rows] *= factor
                linear.bias[rows] *= factor
    model.save_pretrained(folder)
    return folder


def test_a_learned_matrix_beats_the_fixed_one(outliers: Path, tmp_path: Path) -> None:
    """On samples that were not learned from, and with nothing else learned; what is stored has this loss."""
    options = ONLY_KEYS | {"epochs": 12, "patience": 12, "lr": 2e-2, "holdout": 0.25}
    steps = [{"method": "flatquant", "options": options}, "rtn"]
    recipe = {"scheme": "W8A16KV3", "steps": steps, "calibration": CALIBRATION}
    quantkit.quantize(str(outliers), output=tmp_path / "out", recipe=recipe)
    for fact in facts(tmp_path / "out", "loss_before"):
        assert fact["loss"] < 0.6 * fact["loss_before"]
    for fact in facts(tmp_path / "out", "attention"):
        assert fact["condition_keys"] > 1.2  # at the start it is 1
        assert all(0.5 < share < 0.99 for share in fact["clip_keys"] + fact["clip_values"])


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny model -> a checkpoint of it."""
    root = tmp_path_factory.mktemp("outputs")
    for name in CAUSAL:
        quantkit.quantize(str(source(name)), output=root / name, **request("W4A4KV4", "rtn"))
    return {name: root / name for name in CAUSAL}


@pytest.fixture(scope="module")
def reloaded(outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Tiny model -> logits of its checkpoint in another process."""
    return fresh("native", list(outputs.values()), tmp_path_factory.mktemp("logits") / "all")


def block_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_reloads(
    outputs: dict[str, Path], reloaded: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    kv = block_of(outputs[name])["kv_cache"]
    assert (kv["key_transform"], kv["learned_clips"]) == ("dense", True)
    model, _ = quantkit.load(outputs[name])
    with torch.inference_mode():
        output = model(PROMPT)
        assert torch.equal(reloaded[name], output.logits)
        torch.testing.assert_close(model(PROMPT, use_cache=False).logits, output.logits, rtol=1e-4, atol=1e-3)
    assert all(isinstance(layer, QuantisedLayer) for layer in output.past_key_values.layers)
    dims = {one.path: key_dim(one.module) for one in attentions(model)}
    state = model.state_dict()
    assert all(state[f"{path}.key_matrix"].shape == (dim, dim) for path, dim in dims.items())
    model.save_pretrained(tmp_path / "saved")
    saved, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", outputs[name]))
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in saved)
    assert block_of(tmp_path / "saved") == block_of(outputs[name])
    assert sum("key_matrix" in key for key in stored) == 2
    assert read_record(outputs[name] / RUN_RECORD)[-1]["probe_difference"] < 1e-6


def test_generating_is_repeated_forwards(outputs: dict[str, Path]) -> None:
    model, _ = quantkit.load(outputs["llama"])
    cache, ids = quantkit.kv_cache(model), PROMPT
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    done = model.generate(ids, past_key_values=cache, **settings)
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert done.tolist() == ids.tolist()
    assert cache.memory_report().bytes > sum(t.nbytes for n, t in model.named_buffers() if n.endswith("key_matrix"))


def test_sizes_and_the_report(source: Source, outputs: dict[str, Path]) -> None:
    for name in ("llama", "gpt_neox"):
        plan, _, _ = prepare(str(source(name)), expand(**request("W4A4KV4", "rtn")))
        report = inspect_checkpoint(outputs[name])
        assert read_record(outputs[name] / RUN_RECORD)[-1]["output_bytes"] == report.total_bytes
        assert plan.output_bytes == report.total_bytes
        assert report.kv == plan.kv
        assert report.kv is not None
        assert report.kv.describe().endswith("learned shares of the range; keys multiplied by learned matrices")


@pytest.mark.parametrize(
    ("scheme", "options", "stored"),
    [
        ("W4A16KV4G32", {}, {"key_matrix", "key_clip", "value_clip"}),
        ("W4A16KV4G32", ONLY_KEYS | {"parameterisation": "svd"}, {"key_matrix", "key_clip", "value_clip"}),
        ("W4A4KV8", {"clip_start": "wide"}, {"key_clip", "value_clip"}),  # its keys are not rotated
        ("W4A4KV4", {"keys": False}, set()),
        ("W4A4KV4", {"autocast": True}, {"key_matrix", "key_clip", "value_clip"}),
    ],
)
def test_what_is_stored(source: Source, tmp_path: Path, scheme: str, options: dict[str, Any], stored: set[str]) -> None:
    quantkit.quantize(str(source("qwen2")), output=tmp_path / "out", **request(scheme, "rtn", **options))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    own = {key.rpartition(".")[2] for key in tensors if ".self_attn." in key and "_proj." not in key}
    assert own == stored
    kv = block_of(tmp_path / "out")["kv_cache"]
    assert kv["learned_clips"] == bool(stored)
    assert (kv["key_transform"] == "dense") == ("key_matrix" in stored)
    assert any(fact["accepted"] for fact in facts(tmp_path / "out", "loss_before"))
    assert quantkit.load(tmp_path / "out")[0](PROMPT).logits.isfinite().all()


@pytest.mark.parametrize(
    ("before", "following", "options"),
    [("smoothquant", ("gptq", "norm-tweaking"), {}), ("sinq", ("omniquant", "rtn", "norm-tweaking"), ONLY_KEYS)],
)
def test_other_methods_around_it(
    source: Source, tmp_path: Path, before: str, following: tuple[str, ...], options: dict[str, bool]
) -> None:
    recipe = request("W4A8KV4", *following, **options)
    recipe["recipe"]["steps"].insert(0, {"method": before})
    quantkit.quantize(str(source("qwen3")), output=tmp_path / "out", **recipe)
    model, _ = quantkit.load(tmp_path / "out")
    with torch.inference_mode():
        found = [model(PROMPT, use_cache=use).logits for use in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    assert facts(tmp_path / "out", "condition_keys")
    tuned = [event["tuning"] for event in read_record(tmp_path / "out" / RUN_RECORD) if event.get("tuning")]
    assert [fact["skipped_steps"] for fact in tuned] == [0, 0]


def test_a_block_that_learned_nothing_is_rotated_as_without_learning(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "train", lambda *_: loop.Curve(holdout=[1e9]))
    logits = {}
    for keys in (True, False):
        out = tmp_path / str(keys)
        quantkit.quantize(str(source("mistral")), output=out, **request("W4A16KV4G32", "rtn", keys=keys))
        assert not any(fact["accepted"] for fact in facts(out, "loss_before"))
        logits[keys] = fresh_logits.logits_of("quantkit", out)
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-3, atol=1e-3)
    matrix = load_file(tmp_path / "True" / "model.safetensors")["model.layers.1.self_attn.key_matrix"].double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24).double(), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    save_tiny("gemma3", tmp_path / "source", torch.bfloat16, vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "source")
    quantkit.quantize(str(tmp_path / "source"), output=tmp_path / "out", **request("W4A4KV4", "rtn"))
    assert read_record(tmp_path / "out" / RUN_RECORD)[-1]["probe_difference"] < 1e-6
    for dtype in ("auto", torch.float32):
        model, _ = quantkit.load(tmp_path / "out", dtype=dtype)
        expected = torch.bfloat16 if dtype == "auto" else torch.float32
        assert {t.dtype for n, t in model.named_buffers() if n.endswith(("key_matrix", "_clip"))} == {expected}
        assert model(PROMPT).logits.isfinite().all()


def test_a_stopped_run_goes_on_to_the_same_bytes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resumed(source("gpt_neox"), tmp_path, monkeypatch, **request("W4A4KV4", "gptq"))


class _PoolOfOne:
    """As a pool of worker processes, but here: what goes in and out is pickled."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Callable[[Any], Any], task: Any) -> Future[Any]:
        done: Future[Any] = Future()
        with torch.inference_mode(False):  # as in a process of its own
            done.set_result(pickle.loads(pickle.dumps(work(pickle.loads(pickle.dumps(task))))))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


def test_blocks_solved_ahead(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", _PoolOfOne)
    for name, workers in (("here", None), ("there", 1)):
        quantkit.quantize(
            str(source("opt")), output=tmp_path / name, block_parallel=workers, **request("W4A16KV4G32", "rtn")
        )
    here, there = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there"))
    assert here == there


def test_a_portable_checkpoint_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no field for keys and values of 4 bits"):
        quantkit.quantize(
            str(source("llama")), output=tmp_path / "out", format="compressed-tensors",
            **request("W4A16KV4G32", "rtn", **ONLY_KEYS),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_matrix": None}, r"has no tensor 'model.layers.0.self_attn.key_matrix': .*damaged"),
        ({"key_matrix": torch.eye(15)}, r"has '.*key_matrix' as \[15, 15\], config.json says \[16, 16\]: .*damaged"),
        ({"value_clip": torch.ones(3)}, r"has '.*value_clip' as \[3\], config.json says \[2\]: .*damaged"),
        ({}, r"has 'model.layers.0.self_attn.key_clip' and 5 more, which config.json does not describe"),
    ],
)
def test_damage_is_reported(
    outputs: dict[str, Path], tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in outputs["llama"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, Tensor | None] = dict(load_file(damaged / "model.safetensors"))
    tensors |= {f"model.layers.0.self_attn.{name}": tensor for name, tensor in change.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, damaged / "model.safetensors", metadata={"format": "pt"})
    if not change:
        config = json.loads((damaged / "config.json").read_text())
        del config["quantization_config"]["kv_cache"]
        (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantkitError, match=message) as caught:
        quantkit.load(damaged)
    assert "\n" not in str(caught.value)


def test_a_matrix_without_an_inverse_is_reported() -> None:
    model = make_tiny(TINY["llama"]())
    learned = something(model)
    first = next(iter(learned))
    learned[first] = LearnedKV(torch.ones(2), torch.ones(2), torch.zeros(16, 16))
    quantise_kv(model, KV4, learned)
    with pytest.raises(QuantkitError, match="key_matrix of layer 0 has no inverse: the checkpoint is damaged"):
        model(PROMPT)
