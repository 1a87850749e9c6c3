"""SmoothQuant's rule, and what it does to a model with outliers."""

from __future__ import annotations

import fresh_logits
import pytest
import torch
from test_pipeline import dense_copy
from tiny_models import TINY

import quantkit
from quantkit.formats.writer import read_record
from quantkit.transforms.smoothquant import smoothing_scale

CALIBRATION = {"nsamples": 12, "seqlen": 24, "batch_size": 5}


def test_alpha_decides_which_side_is_flat():
    act = torch.tensor([1.0, 50.0, 0.2, 7.0])
    weight = torch.tensor([0.5, 0.01, 3.0, 0.5])
    flat_inputs = smoothing_scale(act, weight, 1.0)
    torch.testing.assert_close(act / flat_inputs, torch.ones(4))
    flat_weights = smoothing_scale(act, weight, 0.0)
    torch.testing.assert_close(weight * flat_weights, torch.ones(4))
    half = smoothing_scale(act, weight, 0.5)  # both sides get the same maximum
    torch.testing.assert_close(act / half, weight * half)


def test_a_channel_that_is_zero_is_left_alone():
    scale = smoothing_scale(torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 3.0**0.5]))


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_reloads(source, tmp_path, name):
    """Weights at 8 bits and inputs as they are: what the transform did must cancel."""
    out = tmp_path / "out"
    quantkit.quantize(str(source(name)), output=out, method="smoothquant", scheme="W8A16", calibration=CALIBRATION)
    found = fresh_logits.logits_of("quantkit", out)
    decoded = fresh_logits.logits_of("in-process", dense_copy(out, tmp_path / "dense"))
    torch.testing.assert_close(found, decoded, rtol=1e-4, atol=1e-4 * float(decoded.abs().max()))
    float_logits = fresh_logits.logits_of("in-process", source(name))
    assert (found - float_logits).norm() < 0.06 * float_logits.norm()
    facts = [fact for event in read_record(out / "quantkit-run.jsonl") for fact in event.get("transforms", ())]
    assert facts
    assert all(fact["method"] == "smoothquant" and 0 < fact["scale_min"] < fact["scale_max"] for fact in facts)


def test_the_search_never_loses_to_no_scale(source, tmp_path):
    steps = [{"method": "smoothquant", "options": {"alpha": "search", "search_tokens": 96}}, "rtn"]
    quantkit.quantize(
        str(source("opt")), output=tmp_path / "out", recipe={"scheme": "W4A6", "steps": steps}, calibration=CALIBRATION
    )
    facts = [f for event in read_record(tmp_path / "out" / "quantkit-run.jsonl") for f in event.get("transforms", ())]
    assert len(facts) == 4
    assert all(fact["loss"] <= fact["loss_before"] for fact in facts)
    assert all(fact["alpha"] is None or 0.4 <= fact["alpha"] <= 0.95 for fact in facts)
