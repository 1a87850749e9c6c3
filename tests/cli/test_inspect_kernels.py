"""``quantkit inspect --kernels``: which implementation runs each layer, and why no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import layer_format, quantise
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.kernels import dispatch
from quantkit.layers.quant_linear import QuantLinear

names = [row.name for row in dispatch.IMPLEMENTATIONS]
FORMATS = {"q_proj": "W4A16G32", "k_proj": "W4A16G24", "v_proj": "W8A16", "o_proj": "WNF4A16G32", "up_proj": "W8A8"}


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    def choose(name: str) -> object:
        scheme = FORMATS.get(name.rpartition(".")[2])
        return layer_format(scheme) if scheme else None

    quantise(tiny("llama", torch.bfloat16), tmp_path / "out", choose, "native")  # type: ignore[arg-type]
    return tmp_path / "out"


def test_says_what_dispatch_will_do(folder: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(folder), "--kernels", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["device"] == "cpu"
    assert {layer["name"].rpartition(".")[2] for layer in shown["layers"]} == set(FORMATS)
    for layer in shown["layers"]:
        layer_fmt = layer_format(FORMATS[layer["name"].rpartition(".")[2]])
        for rows, name in layer["runs"].items():
            empty = QuantLinear(64, 64, False, layer_fmt, torch.bfloat16, device="meta")
            assert name == dispatch.explain(empty, torch.device("cpu"), int(rows))[0].name
        assert list(layer["runs"]) == ["1", "16", "256"]
        assert not set(layer["runs"].values()) & set(layer["passed_over"])
        first = min(names.index(name) for name in layer["runs"].values())
        assert set(names[:first]) <= set(layer["passed_over"])
        if layer["name"].endswith("k_proj"):
            assert layer["passed_over"]["cpu int4"] == "groups of 24 are no multiple of 32"


def test_a_table_and_the_reasons(folder: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(folder), "--kernels", "--device", "cpu"])
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "stored", "as", "1", "row", "16", "rows", "256", "rows"]
    table = lines[1 : lines.index("on cpu; passed over:")]
    assert len(table) == sum(line.split()[0].rpartition(".")[2] in FORMATS for line in table)
    layers = len(table)
    assert f"  cpu int4: groups of 24 are no multiple of 32 ({layers // 5} of {layers} layers)" in lines
    assert f"  cpu int4: nf4 codes are not evenly spaced ({layers // 5} of {layers} layers)" in lines


def test_nothing_was_passed_over(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", dispatch.IMPLEMENTATIONS[-1:])
    quantise(tiny("llama", torch.bfloat16), tmp_path / "out", lambda name: layer_format("W4A16G32"), "native")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--kernels", "--device", "cpu"])
    assert done.stdout.splitlines()[-1] == "on cpu; nothing was passed over"


def test_no_such_device(folder: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(folder), "--kernels", "--device", "cuda:99"])
    assert done.exit_code == 2
    assert "--device cuda:99 is not here" in done.stderr
