"""The command that measures a GPU, on the CPU: every part with small sizes, and the processes that they run in."""

import io
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import typer

from quantkit.eval import bench_decode, bench_gpu, bench_gpu_gemlite, bench_gpu_parts, bench_kv_gpu
from quantkit.eval.bench_gpu_parts import Part
from quantkit.kernels import dispatch
from quantkit.kernels.input_codes import quantize
from quantkit.kernels.triton import fused, heads, integer
from quantkit.kv.quantiser import MinMax

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_gpu_parts, "SHAPES", {"Llama-3-8B": "48x256,32x128", "Other": "16x128"})
    monkeypatch.setattr(bench_gpu_parts, "MODEL_SHAPES", "16x256")
    monkeypatch.setattr(bench_gpu_parts, "AWKWARD", ((30, 520),))
    monkeypatch.setattr(bench_gpu_parts, "COPIED", 2**16)
    monkeypatch.setattr(bench_gpu_parts, "PROMPT", 32)
    monkeypatch.setattr(bench_gpu_parts, "STEPS", 2)
    monkeypatch.setattr(bench_gpu_parts, "ROWS", (1, 3))
    monkeypatch.setattr(bench_gpu_parts, "INTEGER_ROWS", (2,))
    monkeypatch.setattr(bench_gpu_parts, "TOKENS", (4, 1))
    monkeypatch.setattr(bench_gpu_parts, "WIDTHS", (128,))


@pytest.mark.parametrize(
    "scheme", ["W4A16G128", "W3A16G128", "WNF4A16G64", "W4A4", *bench_gpu_parts.CHANGED.split(",")]
)
def test_errors_are_those_of_the_kernels(scheme, monkeypatch):
    lines = list(bench_gpu_parts.errors(CPU, scheme, 9))
    assert {line["implementation"] for line in lines} >= {"reference"}
    assert {line["rows"] for line in lines} == {1, 5, 16, 33, 65, 300}
    assert all(line["right"] and line["error"] > 0 for line in lines)  # bfloat16 is never exact

    def wrong(x, layer, packed):
        return dispatch.reference.linear(x, layer) * 1.03

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (dispatch.IMPLEMENTATIONS[-1]._replace(run=wrong),))
    assert not any(line["right"] for line in bench_gpu_parts.errors(CPU, scheme, 9))


def test_errors_of_inputs(monkeypatch):
    """Of kernels that are for GPUs alone: here functions of PyTorch take their place, right and then wrong ones."""
    off = 1.0

    def norm_quantize(x, norm, inputs, scheme, residual):
        normed = F.rms_norm((x + residual).float(), x.shape[-1:], norm.weight.float(), norm.eps)
        return fused.Normed(quantize(normed * off, scheme, inputs), None, None)

    def gated_quantize(gate, up, function, inputs, scheme):
        return quantize(F.silu(gate.float()) * up.float() * off, scheme, inputs)

    def encode(x, bits, symmetric, low, high):
        return MinMax(bits, symmetric).encode(x * off)

    monkeypatch.setattr(fused, "norm_quantize", norm_quantize)
    monkeypatch.setattr(fused, "gated_quantize", gated_quantize)
    monkeypatch.setattr(heads, "encode", encode)
    monkeypatch.setattr(heads, "multiply", lambda x, matrix: x @ matrix.high * matrix.factor * off)
    right = list(bench_gpu_parts.errors(CPU, "inputs", 9))
    assert len(right) == 3 * 3 + 2 * 2
    assert all(line["right"] for line in right)
    off = 1.05
    assert not any(line["right"] for line in bench_gpu_parts.errors(CPU, "inputs", 9))


def test_what_linears_times_is_launched_before(monkeypatch):
    launched = []

    def run(x, layer, packed):
        launched.append((*x.shape, layer.out_features, packed))
        return dispatch.reference.linear(x, layer)

    layout = dispatch.Layout("fake", lambda layer: "packed", None)
    row = dispatch.Implementation("fake", lambda layer, device: None, run, layout, range(1, 3))
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (row, dispatch.IMPLEMENTATIONS[-1]))
    monkeypatch.setattr(bench_gpu_parts, "AWKWARD_ROWS", (3,))
    list(bench_gpu_parts.errors(CPU, "W3A16G128", 9))
    assert launched == [(1, 256, 48, "packed"), (1, 128, 32, "packed"), (1, 256, 16, "packed")]


def test_linears_have_their_share_of_the_bandwidth(monkeypatch):
    monkeypatch.setattr(bench_gpu_parts, "SCHEMES", "W4A16G128,W8A8")
    monkeypatch.setattr(bench_gpu_parts, "FEW_SCHEMES", "W8A8")
    monkeypatch.setattr(bench_gpu_parts, "_bandwidth", lambda device: 1e9)
    lines = list(bench_gpu_parts.linears(CPU, "", 60))
    cases = dict.fromkeys((line["model"], *line["shape"], line["scheme"], line["rows"]) for line in lines)
    assert list(cases) == [
        ("Llama-3-8B", 48, 256, "W4A16G128", 1), ("Llama-3-8B", 48, 256, "W4A16G128", 3),
        ("Llama-3-8B", 48, 256, "W8A8", 2), ("Llama-3-8B", 32, 128, "W4A16G128", 1),
        ("Llama-3-8B", 32, 128, "W4A16G128", 3), ("Llama-3-8B", 32, 128, "W8A8", 2), ("Other", 16, 128, "W8A8", 2),
    ]  # fmt: skip
    dense, quantised = lines[:2]
    assert dense["percent"] == pytest.approx(100 * 2 * 48 * 256 / dense["seconds"] / 1e9)
    codes, scales, shape = 48 * 256 / 2, 48 * 2 * 2, 16
    assert quantised["percent"] == pytest.approx(100 * (codes + scales + shape) / quantised["seconds"] / 1e9)
    assert len(list(bench_gpu_parts.linears(CPU, "", 0))) == 1  # begins nothing more


def test_a_case_that_fails_does_not_end_the_others(monkeypatch):
    """The first shape cannot be laid out, the second can."""

    def broken(codes, packed, bias, dtype):
        if packed == 48:
            raise RuntimeError("out of\nresources")

    monkeypatch.setattr(integer, "pack", lambda layer: layer.out_features)
    monkeypatch.setattr(integer, "multiply", broken)
    monkeypatch.setattr(bench_gpu_parts, "_KERNELS", {})
    failed, line = bench_gpu_parts.activations(CPU, "", 9)
    assert failed == {"failed": "product (48, 256)", "why": "RuntimeError: out of resources"}
    assert line["against"] == "product 32x128"

    def gone(device):
        raise ValueError("the GPU is gone")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(ValueError, match="the GPU is gone"):
        list(bench_gpu_parts.attempt(torch.device("cuda"), "it", (1 / 0 for _ in range(1))))


def test_bandwidth():
    (line,) = bench_gpu_parts.bandwidth(CPU, "", 9)
    assert line["bytes_per_second"] > 0


def test_activations_against_copies_and_products(monkeypatch):
    """Some of these are for GPUs alone: here they are functions that look at what they are given."""
    multiplied = []

    def norm_quantize(x, norm, inputs, scheme):
        assert (norm.weight.shape, scheme.bits, inputs.op) == (x.shape[1:], 8, "none")

    def gated_quantize(gate, up, function, inputs, scheme):
        assert (gate.shape, function, scheme.bits, inputs.op) == (up.shape, "silu", 8, "none")

    monkeypatch.setattr(fused, "norm_quantize", norm_quantize)
    monkeypatch.setattr(fused, "gated_quantize", gated_quantize)

    def multiply_heads(x, matrix):
        assert (x.shape, matrix.high.shape) == ((1, 1, x.shape[2], 128), (128, 128))

    monkeypatch.setattr(heads, "multiply", multiply_heads)
    monkeypatch.setattr(heads, "encode", lambda x, bits, symmetric, low, high: MinMax(bits, symmetric).encode(x))

    def multiply(codes, packed, bias, dtype):
        multiplied.append((codes.codes.shape, codes.codes.dtype, packed, bias, dtype))

    monkeypatch.setattr(integer, "pack", lambda layer: (layer.out_features, layer.in_features))
    monkeypatch.setattr(integer, "multiply", multiply)
    lines = list(bench_gpu_parts.activations(CPU, "", 9))
    copies = [line for line in lines if line["against"] == "copy"]
    kernels = ("quantise", "hadamard", "kronecker + quantise", "norm + quantise", "silu(x) * x + quantise",
               "heads @ matrix", "heads to 4 bits")  # fmt: skip
    assert [(line["kernel"], line["rows"], line["columns"]) for line in copies] == [
        (kernel, rows, 128) for rows in (4, 1) for kernel in kernels
    ]
    others = [(line["kernel"], line["rows"], line["against"]) for line in lines if line["against"] != "copy"]
    assert others == [("kronecker + quantise", 4, f"product {shape}") for shape in ("48x256", "32x128")]
    assert all(line["ratio"] == line["seconds"] / line["its seconds"] for line in lines)
    assert set(multiplied) == {((4, columns), torch.int8, (rows, columns), None, torch.bfloat16)
                               for rows, columns in ((48, 256), (32, 128))}  # fmt: skip


def test_inputs_and_copies_are_more_than_a_cache_holds(monkeypatch):
    monkeypatch.setattr(bench_gpu_parts, "cache_bytes", lambda device: 5000)
    assert len(bench_gpu_parts._inputs(10, 100, CPU)) == 5  # of 2000 bytes each
    assert len(bench_gpu_parts._inputs(1, 10, CPU)) == 32
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.zeros(*shape, **options))
    assert bench_gpu_parts._copy(3000, CPU)(3).nbytes == 1500


@pytest.mark.slow
def test_models(monkeypatch):
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 50}  # fmt: skip
    monkeypatch.setitem(bench_decode.SHAPES, "llama-3-8b", tiny)
    lines = list(bench_gpu_parts.models(CPU, "", 60))
    names = ["W4A16G128", "W8A8", "W4A4+kronecker"]
    assert [(line["model"], line["against"]) for line in lines] == [
        pair for name in names for pair in (("dense", name), (name, name))
    ]
    assert all(line["speedup"] > 0 and line["prefill_speedup"] > 0 for line in lines)
    assert len(list(bench_gpu_parts.models(CPU, "", 0))) == 2


def test_attention_is_that_of_its_own_file(monkeypatch):
    def rows(device):
        yield {"device": str(device)}
        raise RuntimeError("too long")

    monkeypatch.setattr(bench_kv_gpu, "attention", rows)
    first, failed = bench_gpu_parts.attention(CPU, "", 9)
    assert first == {"device": "cpu"}
    assert failed["why"] == "RuntimeError: too long"


class Gemlite:
    """``from_weights`` as gemlite.helper's classes have it, for 16-bit inputs."""

    def __init__(self, device, dtype):
        self.dtype = dtype

    def from_weights(self, codes, scales, zeros=None):
        group = codes.shape[1] // scales.shape[1]
        assert zeros is None or (codes.dtype, scales.shape) == (torch.uint8, zeros.shape)
        assert zeros is not None or (codes.dtype, group) == (torch.int8, codes.shape[1])
        spread = scales.repeat_interleave(group, dim=1)
        weight = (codes.to(self.dtype) - (0 if zeros is None else zeros.repeat_interleave(group, dim=1))) * spread
        return lambda x: F.linear(x, weight)


def test_gemlite_beside_ours(monkeypatch, tmp_path):
    module, helper = ModuleType("gemlite"), ModuleType("gemlite.helper")
    module.__spec__, module.__file__ = ModuleSpec("gemlite", None), str(tmp_path / "__init__.py")
    loaded = []
    module.load_config = loaded.append
    for name in ("A16W8_INT8", "A8W8_int8_dynamic", "A16W4_HQQ_INT", "A16W2_HQQ_INT"):
        setattr(helper, name, Gemlite)
    monkeypatch.setitem(sys.modules, "gemlite", module)
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_gpu_gemlite, "ROWS", (1, 2))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "h100.json").touch()
    lines = list(bench_gpu_parts.gemlite(CPU, "", 60))
    assert loaded == [str(tmp_path / "configs" / "h100.json")]
    assert len(lines) == 2 * 4 * 2 * 3
    assert [line["implementation"] for line in lines[:3]] == ["dense", "gemlite", "quantkit"]
    assert all(line["speedup"] > 0 for line in lines)
    assert len(list(bench_gpu_parts.gemlite(CPU, "", 0))) == 3


def test_without_gemlite_there_is_a_note(monkeypatch):
    monkeypatch.setattr(bench_gpu_gemlite, "NAME", "gemlite_that_is_not_there")
    (line,) = bench_gpu_parts.gemlite(CPU, "", 9)
    assert "not installed" in line["note"]


@pytest.fixture
def here(monkeypatch):
    """Processes are calls: each gets its arguments, and what goes wrong in it is what it says."""

    def start(command, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", "quantkit.eval.bench_gpu_parts"]
        code: int | None = 0
        try:
            bench_gpu_parts.main(*command[3:])
        except TimeoutError:
            code = None
        except ArithmeticError as error:
            stderr.write(f"Traceback\n  {error!r}\n\n")
            code = 1
        ended = []

        def wait(seconds=0.0):
            if code is None and not ended:
                raise subprocess.TimeoutExpired("it", seconds)
            return code

        return SimpleNamespace(wait=wait, kill=lambda: ended.append(True))

    monkeypatch.setattr(subprocess, "Popen", start)
    parts = {}
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    monkeypatch.setattr(bench_gpu_parts, "PARTS", parts)
    return parts


def test_a_part_that_fails_leaves_what_it_found_and_the_others(here, tmp_path, capfd, monkeypatch):
    def rows(device, which, seconds):
        yield {"which": which, "device": str(device), "error": 0.01}
        if which == "slow":
            raise TimeoutError
        yield {"failed": f"one case of {which}", "why": "it is too long"}
        yield {"seconds": seconds, "error": 0.01}
        if which == "wrong":
            raise ZeroDivisionError("the kernel broke")

    here |= {"errors": Part(rows, 1, ("right", "wrong", "slow")), "after": Part(rows, 3)}
    now = iter(range(0, 10000, 10))
    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: float(next(now)))
    found = {"command": "c", "environment": {"torch": "2.0"}, "device": "D", "cuda": "13", "parts": {}, "failed": []}
    bench_gpu.measure(found, ["errors", "after"], "cpu", 400, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    (first, full, *others), after = found["parts"]["errors"], found["parts"]["after"]
    assert first == {"which": "right", "device": "cpu", "error": 0.01}
    assert full["seconds"] == pytest.approx(0.8 * (400 - 10) / 4)
    assert [row.get("which") for row in others] == ["wrong", None, "slow"]
    assert len(after) == 2
    assert after[1]["seconds"] > 3 * full["seconds"] / 1.5  # the rest of the time
    _, case, wrong, slow, _ = found["failed"]
    assert case == {"part": "errors", "which": "one case of wrong", "why": "it is too long"}
    assert (wrong["which"], wrong["why"]) == ("wrong", "ended with status 1: ZeroDivisionError('the kernel broke')")
    assert slow["why"].startswith("was stopped after 9")
    assert found["targets"][0]["result"] == "met"
    page = (tmp_path / "gpu.md").read_text()
    assert page.index("## targets") < page.index("## failed") < page.index("## errors") < page.index("## after")
    said = capfd.readouterr().err
    assert "errors: 5 figures" in said
    assert "wrong ended with status 1" in said


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(bench_gpu._read(tmp_path / "lines")) == [{"a": 1}, {"a": 2}]
    assert list(bench_gpu._read(tmp_path / "none")) == []


@pytest.mark.slow
def test_processes_run():
    rows, failed = bench_gpu.run("bandwidth", "nowhere", 120)
    assert rows == []
    (one,) = failed
    assert one["why"].startswith("ended with status 1: RuntimeError")


def test_the_page_has_every_figure():
    found = {
        "command": "c", "environment": {"torch": "2.0"}, "device": "D", "cuda": "13", "targets": [],
        "parts": {
            "linears": [{"shape": [2, 3], "rows": 1, "seconds": 2.5e-6, "speedup": 1.5, "chosen": True}],
            "models": [{"model": "dense", "decode": {"median": 1e-3, "p20": 1e-3, "p80": 2e-3, "rounds": 5}},
                       {"note": "a|b"}],
            "errors": [],
        },
        "failed": [{"part": "errors", "which": "W8", "why": "was stopped"}],
    }  # fmt: skip
    lines = bench_gpu.page(found).splitlines()
    assert lines[0] == "# D"
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    assert cells[:3:2] == [["part", "which", "why"], ["errors", "W8", "was stopped"]]
    assert cells[3] == ["shape", "rows", "seconds us", "speedup", "chosen"]
    assert cells[5] == ["2 x 3", "1", "2.5", "1.5", "True"]
    assert ["dense", "1000.0", "1000.0", "2000.0", "5", ""] in cells
    assert ["", "", "", "", "", "a/b"] in cells
    assert "## errors" not in lines


def test_the_command(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no GPU"):
            bench_gpu.main(tmp_path, None, "cuda", 5.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the {device}")
    with pytest.raises(typer.BadParameter, match="no part 'linear'; there are bandwidth"):
        bench_gpu.main(tmp_path, ["linear"], "cuda", 5.0)
    asked = []
    monkeypatch.setattr(bench_gpu, "measure", lambda *arguments: asked.append(arguments))
    bench_gpu.main(tmp_path, None, "cuda:1", 5.0)
    ((found, names, device, seconds, output),) = asked
    assert (found["device"], found["failed"], names) == ("the cuda:1", [], list(bench_gpu_parts.PARTS))
    assert (device, seconds, output) == ("cuda:1", 300.0, tmp_path)
    bench_gpu.page(found | {"targets": []})


def test_rows_survive_json(monkeypatch, tmp_path):
    """What every part yields can be written: shapes, numbers and text alone."""
    monkeypatch.setattr(bench_gpu_parts, "PARTS", {"a": Part(bench_gpu_parts.bandwidth, 1)})
    bench_gpu_parts.main("a", "", "cpu", "9", str(tmp_path / "lines"))
    (line,) = map(json.loads, io.StringIO((tmp_path / "lines").read_text()))
    assert line["bytes_per_second"] > 0
