import torch
from handmade import layer_format

from quantkit.kernels import dispatch
from quantkit.layers.quant_linear import QuantLinear


def test_the_first_row_that_takes_the_call_runs(monkeypatch):
    layer = QuantLinear(8, 4, False, layer_format("W4A16G8"), torch.float32)
    few = dispatch.Implementation("few", takes=lambda x, layer: x.shape[0] < 3, run=lambda x, layer: x.new_zeros(1))
    every = dispatch.Implementation("every", takes=lambda x, layer: True, run=lambda x, layer: x.new_ones(1))
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (few, every))
    assert dispatch.choose(torch.zeros(2, 8), layer).name == "few"
    assert dispatch.choose(torch.zeros(3, 8), layer).name == "every"
    assert layer(torch.zeros(2, 8)).item() == 0
    assert layer(torch.zeros(3, 8)).item() == 1


def test_the_last_row_takes_everything():
    layer = QuantLinear(8, 4, False, layer_format("WNF4A16G8"), torch.float64)
    assert dispatch.IMPLEMENTATIONS[-1].name == "reference"
    assert dispatch.IMPLEMENTATIONS[-1].takes(torch.zeros(0, 8), layer)
