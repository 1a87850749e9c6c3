"""What is measured of quantised caches on GPUs, on a CPU and small."""

from __future__ import annotations

import pytest
import torch

from quantkit.eval import bench_kv_gpu


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CASES": ((2, 140),), "HEADS": 2, "WIDTH": 32, "PACKED_AT_ONCE": (1,), "_ROUNDS": 3}.items():
        monkeypatch.setattr(bench_kv_gpu, name, value)


def test_rows_of_errors_and_of_times():
    device = torch.device("cpu")
    errors = bench_kv_gpu.errors(device, 140)
    assert [row["what"] for row in errors] == ["1 bit", "1 bit", "2 bit", "2 bit"]
    assert all(row["right"] and 0 < row["error"] < 5e-3 and not row["kernel"] for row in errors)
    rows = list(bench_kv_gpu.attention(device))[len(errors) :]
    assert [row["what"] for row in rows] == [
        "bfloat16", "1 bit", "2 bit", *(f"pack {side}, {bits} bit" for bits in (1, 2) for side in ("keys", "values")),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["against bfloat16"] == 1
    assert rows[3]["tokens"] == 64


def test_all_that_is_measured_attends_to_the_same(monkeypatch):
    """Values that do not differ are the same in bfloat16 and in codes."""

    def states(tokens, device):
        return torch.randn(1, 2, tokens, 32).bfloat16(), torch.ones(1, 2, tokens, 32).bfloat16()

    monkeypatch.setattr(bench_kv_gpu, "_states", states)
    outputs = {}
    compare = bench_kv_gpu.compare

    def kept(candidates, *rest, **options):
        outputs.update({name: run(0).float().mean() for name, run in candidates.items()})
        return compare(candidates, *rest, **options)

    monkeypatch.setattr(bench_kv_gpu, "compare", kept)
    bench_kv_gpu.decoding(torch.device("cpu"), 2, 140)
    assert outputs.keys() == {"bfloat16", "1 bit", "2 bit"}
    assert all(abs(mean - 1) < 1e-2 for mean in outputs.values())
