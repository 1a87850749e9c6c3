"""Targets, from a made-up file of figures."""

import json

import pytest

from quantkit.eval import bench_gpu_parts
from quantkit.eval.bench_gpu_targets import GATE_UP, TARGETS, judged
from quantkit.eval.bench_kernels import parse_shapes


def linear(scheme, rows, shape=GATE_UP, model="Llama-3-8B", chosen=True, **figures):
    return {"model": model, "shape": list(shape), "scheme": scheme, "rows": rows, "implementation": "triton",
            "chosen": chosen, "seconds": 1e-5, "percent": 50.0, "speedup": 1.0} | figures  # fmt: skip


def results(found):
    judgements = judged(json.loads(json.dumps(found)))
    assert len(judgements) == len(TARGETS)
    return {row["target"]: (row["result"], row["worst"], row["figures"]) for row in judgements}


def only(found, words):
    return next(value for target, value in results(found).items() if all(word in target for word in words))


def test_nothing_measured():
    assert {result for result, _, _ in results({}).values()} == {"not measured"}


def test_the_worst_figure_counts():
    lines = [linear("W4A16G128", rows, percent=percent) for rows, percent in ((1, 90.0), (4, 70.0), (16, 80.0))]
    words = ("W4A16G128", "share")
    assert only({"linears": lines}, words) == ("met", 70.0, 3)
    assert only({"linears": [*lines, linear("W4A16G128", 1, percent=69.9)]}, words) == ("not met", 69.9, 4)


@pytest.mark.parametrize(
    "other",
    [
        linear("W4A16G128", 64, percent=1.0), linear("W8A16", 4, percent=1.0),
        linear("W4A16G128", 1, (4096, 4096), percent=1.0), linear("W4A16G128", 1, model="Llama-3-70B", percent=1.0),
        linear("W4A16G128", 1, chosen=False, percent=1.0),
    ],
)  # fmt: skip
def test_figures_of_something_else_do_not(other):
    lines = [linear("W4A16G128", 1, percent=75.0), other]
    assert only({"linears": lines}, ("W4A16G128", "share")) == ("met", 75.0, 1)


def test_every_bound_is_on_its_side():
    """Figures that just keep every target, and then just do not."""
    speed = {64: 2.0, 256: 1 / 1.5, 1024: 1 / 1.3, 4096: 1 / 1.1}

    def figures(share):
        lines = [linear("W4A16G128", 1, percent=70 * share), linear("W8A16", 1, percent=65 * share),
                 linear("W2A16G128", 1, percent=65 * share), linear("W8A8", 512, speedup=1.6 * share),
                 linear("W4A8", 1024, speedup=1.4 * share), linear("W4A8G128", 4096, speedup=1.4 * share),
                 linear("W4A16G128", 16, (4096, 4096), seconds=5e-6 / share, percent=0.0)]  # fmt: skip
        lines += [linear("W4A16G128", rows, speedup=speedup * share) for rows, speedup in speed.items()]
        kernels = (("kronecker + quantise", "product 28672x4096", 0.1), ("norm + quantise", "copy", 1.3))
        inputs = [{"kernel": kernel, "against": against, "rows": 2048, "ratio": ratio / share}
                  for kernel, against, ratio in kernels]  # fmt: skip
        inputs += [{"kernel": kernel, "against": against, "rows": 1, "ratio": 99.0} for kernel, against, _ in kernels]
        inputs += [{"kernel": "kronecker + quantise", "against": "copy", "rows": 2048, "ratio": 9.0}]
        models = [{"model": "dense", "speedup": 1.0}, {"model": "W4A16G128", "speedup": 2.2 * share}]
        times = (("dense", 9.0), ("gemlite", share), ("quantkit", 1.0))
        beside = [{"shape": [8, 8], "scheme": "W8A8", "rows": rows, "implementation": name, "seconds": seconds}
                  for rows in (1, 64) for name, seconds in times]  # fmt: skip
        beside.append({"shape": [8, 8], "scheme": "W8A8", "rows": 256, "implementation": "gemlite", "seconds": 1e-9})
        return {"linears": lines, "activations": inputs, "models": models, "errors": [{"error": 0.019 / share}],
                "gemlite": beside}  # fmt: skip

    assert {result for result, _, _ in results(figures(1.001)).values()} == {"met"}
    assert {result for result, _, _ in results(figures(0.9)).values()} == {"not met"}


def test_without_gemlite_nothing_is_compared_with_it():
    assert only({"gemlite": [{"note": "gemlite is not installed"}]}, ("gemlite",))[0] == "not measured"


def test_an_error_that_is_no_number_is_not_right():
    assert only({"errors": [{"error": 0.001}, {"error": float("nan")}]}, ("float64",))[0] == "not met"


def test_what_targets_are_about_is_measured():
    """A shape, a scheme or a number of rows that nobody times would be ``not measured`` for ever."""
    found = [linear(case.scheme, rows, case.shape, case.model) for case in bench_gpu_parts._cases()
             for rows in case.rows]  # fmt: skip
    left = [target for target, (result, _, _) in results({"linears": found}).items() if result == "not measured"]
    assert [target.partition(":")[0] for target in left] == [
        "every kernel", "layers that gemlite takes, any number of rows", "Kronecker product + quantise, 2048 rows",
        "norm + quantise, 2048 rows",
        "Llama-3-8B, W4A16G128, decoding",
    ]  # fmt: skip
    assert 2048 in bench_gpu_parts.TOKENS
    assert parse_shapes(bench_gpu_parts.SHAPES["Llama-3-8B"])[0] == GATE_UP
