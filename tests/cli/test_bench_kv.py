"""``quantkit bench kv``: what is measured, printed and written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from transformers.cache_utils import DynamicLayer
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.eval import bench_kv as bench
from quantkit.kv.cache import QuantisedLayer

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    save_tiny("llama", tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_prints_and_writes_every_case(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--kv", "int8,nsnquant-1bit,int8", "--context", "40,80", "--batch", "2", "--rounds", "3"]
    done = CliRunner().invoke(app, ["bench", "kv", tiny, *flags, "--device", "cpu", "--json", str(out)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[:6] == ["model", "tokens", "cache", "bytes", "bits", "x"]
    written = json.loads(out.read_text())
    assert {"command", "environment", "device", "threads", "dtype", "rows"} == set(written)
    rows = written["rows"]
    assert len(rows) == len(lines) - 1
    found = [(row["context"], row["kv"], row["attention"]) for row in rows]
    ways = [("none", "dense"), *((kv, way) for kv in ("int8", "nsnquant-1bit") for way in ("packed", "dense"))]
    assert found == [(context, *way) for context in (40, 80) for way in ways]
    for row in rows:
        assert row["model"] == tiny
        assert row["batch"] == 2
        assert row["decode"]["p20"] <= row["decode"]["median"] <= row["decode"]["p80"]
        full = next(one for one in rows if (one["context"], one["kv"]) == (row["context"], "none"))
        assert full["bytes"] == 2 * 2 * 2 * row["context"] * 16 * 2  # sides, batch, heads, tokens, head_dim, bfloat16
        assert row["times_smaller"] == pytest.approx(full["bytes"] / row["bytes"])
        assert row["decode_ratio"] == pytest.approx(full["decode"]["median"] / row["decode"]["median"])
        elements = full["bytes"] / 2
        assert row["bits_per_element"] == pytest.approx(8 * row["bytes"] / elements)
        if row["kv"] == "int8":
            assert row["bytes"] == elements + elements / 16 * 2  # a scale for each token and head


def test_bytes_alone(tiny: str) -> None:
    done = CliRunner().invoke(
        app, ["bench", "kv", tiny, "--kv", "kivi-2bit", "--context", "300", "--rounds", "0", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "tokens", "cache", "bytes", "bits", "x", "smaller"]
    assert [line.split()[2] for line in lines[1:]] == ["none", "kivi-2bit"]


def test_layers_are_filled_as_if_at_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_PIECE", 16)
    shape = bench._shape(tiny, 2, False)
    assert (shape.query_heads, shape.heads, shape.key_dim, shape.value_dim) == (4, 2, 16, 16)
    assert shape.rope is not None
    full, kept = DynamicLayer(), QuantisedLayer(shape.layer_kv("nsnquant-2bit"))
    for layer in (full, kept):
        bench.fill(layer, shape, 150, torch.empty(0))
    assert full.get_seq_length() == kept.get_seq_length() == 150
    whole = QuantisedLayer(kept.kv)
    whole.update(full.keys, full.values)
    for side, other in zip(kept.read(), whole.read(), strict=True):
        assert torch.equal(side, other)
    spreads = full.keys.std(dim=2)
    assert spreads.amax() > 3 * spreads.amin()


def test_both_ways_to_read_give_the_same(tiny: str) -> None:
    shape = bench._shape(tiny, 2, False)
    for name in ("int8", "nsnquant-1bit"):
        results = []
        for attention in ("packed", "dense"):
            layer = QuantisedLayer(shape.layer_kv(name))
            bench.fill(layer, shape, 150, torch.empty(0))
            with torch.inference_mode():
                results.append(bench._step(layer, attention, *bench._next_token(shape, 150, torch.empty(0)), 0))
            assert layer.get_seq_length() == 151
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv", "int9"], "unknown cache method 'int9'"),
        (["--context", "4096,0"], "--context '4096,0' cannot be read: write numbers of tokens"),
        (["--context", "long"], "--context 'long' cannot be read"),
        (["--attention", "sparse"], "--attention 'sparse' cannot be read: write packed, dense or packed,dense"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kv", "llama-1b", "--device", "cpu", *flags])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    save_tiny("mistral", tmp_path / "sliding")
    done = CliRunner().invoke(app, ["bench", "kv", str(tmp_path / "sliding"), "--device", "cpu"])
    assert done.exit_code == 1
    assert "no layer of MistralForCausalLM has queries that see all tokens" in done.stderr


def test_help_has_examples() -> None:
    done = CliRunner().invoke(app, ["bench", "kv", "--help"])
    assert done.exit_code == 0
    assert "quantkit bench kv llama-3-8b" in done.stdout
