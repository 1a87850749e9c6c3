"""Decoding is timed on steps that are the model's own, dense and quantised from the same start."""

import json

import pytest
import torch
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.eval import bench_decode as bench
from quantkit.eval.bench_kernels import parse_schemes
from quantkit.eval.decoding import Decoding, GraphDecoding

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path):
    save_tiny("llama", tmp_path / "tiny", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "tiny")
    return tmp_path / "tiny"


@torch.inference_mode()
def test_both_ways_to_decode_are_what_generate_does(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    prompt = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    for way in (Decoding, GraphDecoding):
        decoding = way(model, prompt, 6)
        for number in range(3):  # each round begins where the first one did
            assert torch.equal(decoding(number), expected[:, 5:])


def test_a_shape_is_quantised_where_its_blocks_are(tiny):
    rows = bench.bench(str(tiny), parse_schemes("W4A16G32,W8A8"), torch.float32, CPU, tokens=2, prefill=8, rounds=3)
    assert [row.name for row in rows] == ["dense", "W4A16G32", "W8A8"]
    dense, four, eight = rows
    model = AutoModelForCausalLM.from_pretrained(tiny)
    inside = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n)
    parameters = 4 * sum(tensor.numel() for tensor in model.parameters())
    assert parameters <= dense.weight_bytes < parameters * 1.01
    assert four.weight_bytes < parameters - 4 * inside + 1.2 * inside  # at most 4 bits, and scales and zero points
    assert four.weight_bytes < eight.weight_bytes < parameters - 4 * inside + 1.5 * inside
    assert dense.speedup == dense.prefill_speedup == 1
    assert four.speedup == pytest.approx(dense.decode.median / four.decode.median)
    assert four.prefill_speedup == pytest.approx(dense.prefill.median / four.prefill.median)


def test_what_is_done_to_one_input_is_done_once(tiny, monkeypatch):
    made = []
    monkeypatch.setattr(bench, "compare", lambda candidates, *_, **__: made.extend(candidates.values()) or {
        name: bench.Timing(1.0, 1.0, 1.0, 3) for name in candidates
    })  # fmt: skip
    bench.bench(str(tiny), parse_schemes("W4A4+kronecker"), torch.float32, CPU)
    block = made[1]._model.model.layers[0]
    readers = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    assert all(reader.format.input_op == "kronecker" for reader in readers)
    assert len({id(reader.shared_input) for reader in readers}) == 1
    assert readers[0].shared_input is not None


def test_a_quantised_checkpoint_is_timed_as_it_is(tiny, tmp_path):
    quantkit.quantize(str(tiny), output=tmp_path / "out", method="rtn", scheme="W3A16G32")
    file = tmp_path / "decode.json"
    flags = ["--device", "cpu", "--dtype", "float32", "--tokens", "2", "--rounds", "3", "--json", str(file)]
    done = CliRunner().invoke(app, ["bench", "decode", str(tmp_path / "out"), *flags])
    assert done.exit_code == 0, done.output
    assert done.stdout.split("\n")[0].split() == [
        "model", "tokens/s", "ms/token", "p20", "p80", "x", "dense", "weights", "resident",
    ]  # fmt: skip
    dense, quantised = json.loads(file.read_text())["rows"]
    assert (dense["model"], quantised["model"]) == ("dense", "out")
    assert quantised["weight_bytes"] < dense["weight_bytes"]
    assert quantised["tokens_per_second"] == pytest.approx(1 / quantised["decode"]["median"])


def test_bad_models_are_named(tmp_path):
    done = CliRunner().invoke(app, ["bench", "decode", str(tmp_path / "nothing")])
    assert done.exit_code != 0
    assert "nothing" in done.stderr
    save_tiny("bert", tmp_path / "bert")
    done = CliRunner().invoke(app, ["bench", "decode", str(tmp_path / "bert"), "--device", "cpu"])
    assert done.exit_code == 1
    assert "needs a causal language model" in done.stderr
    assert len(done.stderr.splitlines()) == 1
