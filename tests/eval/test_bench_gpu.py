"""What does not need a GPU of the command that measures one: errors against float64, and the page."""

import pytest
import torch

from quantkit.eval import bench_gpu
from quantkit.eval.bench_kernels import parse_schemes
from quantkit.kernels import dispatch

CPU = torch.device("cpu")


@pytest.mark.parametrize("scheme", ["W4A16G128", "W3A16G128", "WNF4A16G64", "W4A4"])
def test_errors_are_those_of_the_kernels(scheme, monkeypatch):
    monkeypatch.setattr(bench_gpu, "SCHEMES", scheme)
    monkeypatch.setattr(bench_gpu, "AWKWARD", ((30, 520),))
    lines = bench_gpu.errors(CPU)
    assert {line["implementation"] for line in lines} >= {"reference"}
    assert {line["rows"] for line in lines} == {1, 5, 16, 33, 65, 300}
    assert all(line["right"] and line["error"] > 0 for line in lines)  # bfloat16 is never exact

    def wrong(x, layer, packed):
        return dispatch.reference.linear(x, layer) * 1.03

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (dispatch.IMPLEMENTATIONS[-1]._replace(run=wrong),))
    assert not any(line["right"] for line in bench_gpu.errors(CPU))


def test_the_page_has_every_figure():
    found = {
        "command": "c", "environment": {"torch": "2.0"}, "device": "D", "cuda": "13",
        "linears": [{"shape": [2, 3], "rows": 1, "seconds": 2.5e-6, "speedup": 1.5, "chosen": True}],
        "models": [{"model": "dense", "decode": {"median": 1e-3, "p20": 1e-3, "p80": 2e-3, "rounds": 5}}],
        "errors": [],
    }  # fmt: skip
    lines = bench_gpu.page(found).splitlines()
    assert lines[0] == "# D"
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["shape", "rows", "seconds us", "speedup", "chosen"]
    assert cells[2] == ["2 x 3", "1", "2.5", "1.5", "True"]
    assert ["dense", "1000.0", "1000.0", "2000.0", "5"] in cells
    assert not any("errors" in line for line in lines)


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="sees no GPU"):
        bench_gpu.main(tmp_path, None, "cuda", 5.0)


def test_what_is_left_out_is_left_out_of_what_is_measured():
    assert set(parse_schemes(",".join(bench_gpu.ONLY_ON.values()))) <= set(parse_schemes(bench_gpu.SCHEMES))
