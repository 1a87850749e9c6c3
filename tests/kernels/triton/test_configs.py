import json

import pytest
import torch

from quantkit.kernels.triton import compat, configs, layout
from quantkit.kernels.triton.configs import Config, Device, Problem
from quantkit.recipe import PER_CHANNEL

H200 = Device("sm_90", 132, "H200")


def problem(rows: int, out_features: int = 4096, columns: int = 4096, bits: int = 4, group_size: int = 128) -> Problem:
    blocks = -(-columns // layout.block_columns(bits))
    return Problem(bits, group_size, False, "uniform", "bfloat16", out_features, blocks, configs.bucket(rows))


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (9, 16), (33, 64), (256, 256), (999, 256)])
def test_buckets(rows, size):
    assert configs.bucket(rows) == size


def test_few_rows_keep_every_processor_busy():
    """32 tiles of a 4096 x 4096 weight: eight programs each for 132 processors; wide ones need few, or none."""
    assert configs.heuristic(problem(1), H200).split == 8
    assert configs.heuristic(problem(1, out_features=28672), H200).split == 2
    assert configs.heuristic(problem(256, out_features=28672), H200).split == 1
    assert configs.heuristic(problem(64), Device("sm_80", 108)).split == 4  # 64 programs would leave 44 idle
    assert configs.heuristic(problem(64), H200).split == 4  # 128 are enough, the workspace is half the weight already
    assert configs.heuristic(problem(1, columns=128), H200).split == 1  # there is one block


@pytest.mark.parametrize("kind", configs.TABLE)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_choice_is_possible(kind, bits):
    for rows in configs.TABLE[kind]:
        config = configs.heuristic(problem(rows, bits=bits), Device(kind, 100))
        assert layout.ROWS % config.block_n == 0
        assert config.stages >= 1
        assert config.block_m >= 8


def test_scales_go_where_they_cost_less():
    assert configs.heuristic(problem(32), H200).scale_after
    assert not configs.heuristic(problem(64), H200).scale_after
    assert not configs.heuristic(problem(16, group_size=32), H200).scale_after
    assert configs.heuristic(problem(256, group_size=PER_CHANNEL), H200).scale_after


@pytest.mark.parametrize(("kind", "used"), [("sm_89", "sm_80"), ("sm_100", "sm_80"), ("gfx950", "gfx942")])
def test_other_devices_borrow_a_table(kind, used):
    assert configs.nearest(kind) == used


def test_measures_only_on_request_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_fastest", {})
    timed: list[Config] = []

    def milliseconds(run, config):
        timed.append(config)
        return abs(config.split - 4) + (config.stages != 5)

    monkeypatch.setattr(configs, "_milliseconds", milliseconds)
    asked = problem(3)
    assert configs.choose(asked, H200, lambda config: None) == configs.heuristic(asked, H200)
    monkeypatch.setenv("QUANTKIT_AUTOTUNE", "1")
    assert configs.choose(asked, H200, None) == configs.heuristic(asked, H200)  # as in graph capture
    assert not timed
    found = configs.choose(asked, H200, lambda config: None)
    assert found.split == 4
    assert len(timed) == len(configs.candidates(asked, H200)) == len(set(timed)) > 5

    timed.clear()
    monkeypatch.setattr(configs, "_fastest", {})  # another process
    assert configs.choose(asked, H200, lambda config: None) == found
    configs.choose(problem(3), Device("sm_90", 132, "H200"), lambda config: None)
    assert not timed
    configs.choose(asked, Device("sm_90", 114, "H100"), lambda config: None)
    assert timed

    timed.clear()
    monkeypatch.setattr(configs, "_fastest", {})
    monkeypatch.setattr(compat, "version", lambda: "99.9")  # another compiler: what was fastest may not even fit
    configs.choose(asked, H200, lambda config: None)
    assert timed


def test_a_broken_file_is_as_good_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QUANTKIT_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "_fastest", {})
    monkeypatch.setattr(configs, "_milliseconds", lambda run, config: 1.0)
    path = configs._cache_file(H200, f"weight-only-{configs.VERSION}")
    path.parent.mkdir()
    path.write_text("{")
    configs.choose(problem(3), H200, lambda config: None)
    assert len(json.loads(path.read_text())) == 1


def test_the_interpreter_counts_as_one_processor():
    assert configs.device_of(torch.device("cpu")).processors == 1
