"""Which row runs a call, and the layout that a layer has while it runs."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from handmade import layer_format
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kernels import dispatch, reference
from quantkit.kernels.dispatch import Implementation, Layout
from quantkit.kernels.lacking import Lacking, say_once
from quantkit.layers.quant_linear import QuantLinear

pytestmark = pytest.mark.usefixtures("kernels")
REFERENCE = dispatch.IMPLEMENTATIONS[-1]


def linear(scheme: str = "W4A16G8", dtype: torch.dtype = torch.float32) -> QuantLinear:
    layer = QuantLinear(8, 4, False, layer_format(scheme), dtype)
    layer.weight_packed.random_(-(2**31), 2**31)
    layer.weight_scale.uniform_(0.5, 1)
    return layer


def row(name: str, **settings: Any) -> Implementation:
    """A row that takes everything and answers with its name's length."""
    given: dict[str, Any] = {
        "refuses": lambda layer, device: None,
        "run": lambda x, layer, packed: x.new_full((1,), len(name)),
    }
    return Implementation(name, **(given | settings))


class Negated:
    """A layout that is easy to see: all bits turned over. Counts what is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, restores: bool = True, packs: bool = True) -> None:
        self.packed = self.restored = 0
        self.packs = packs
        self.layout = Layout("negated", self.pack, self.restore if restores else None)
        table = (row("negated", layout=self.layout, run=self.run), REFERENCE)
        monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", table)

    def pack(self, layer: QuantLinear) -> Tensor | None:
        self.packed += 1
        return ~layer.weight_packed if self.packs else None

    def restore(self, packed: Tensor, layer: QuantLinear) -> Tensor:
        self.restored += 1
        return ~packed

    def run(self, x: Tensor, layer: QuantLinear, packed: Tensor) -> Tensor:
        return packed


def test_the_first_row_that_takes_the_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (row("of 5", refuses=lambda layer, device: "never"), row("of four", rows=range(1, 3)), row("of all"))
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", table)
    layer = linear()
    names = [dispatch.choose(torch.zeros(*shape, 8), layer).name for shape in ((), (1,), (2, 1), (3,), (2, 2), (0,))]
    assert names == ["of four", "of four", "of four", "of all", "of all", "of all"]
    assert layer(torch.zeros(2, 8)).item() == len("of four")
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", table[2:])  # another table is noticed
    assert dispatch.choose(torch.zeros(2, 8), layer).name == "of all"


def test_the_last_row_takes_everything() -> None:
    layer = QuantLinear(8, 4, False, layer_format("WNF4A16G8"), torch.float64, device="meta")
    assert REFERENCE.name == "reference"
    assert REFERENCE.refuses(layer, torch.device("cuda:7")) is None
    assert 0 in REFERENCE.rows
    assert dispatch.explain(layer, torch.device("cuda:7"), 10**9)[0] is REFERENCE


def test_why_each_row_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (Layout(name, lambda layer: None, None) for name in ("one", "two"))
    table = (
        row("refuses", refuses=lambda layer, device: f"not on {device.type}", layout=two),
        row("few", layout=one, rows=range(5)),
        row("other layout", layout=two),
        row("many", layout=one),
        row("never reached"),
    )
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", table)
    chosen, against = dispatch.explain(linear(), torch.device("cpu"), 16)
    assert chosen.name == "many"
    assert against == {
        "refuses": "not on cpu",
        "few": "for 0 to 4 rows",
        "other layout": "the weight is in the layout 'one'",
    }


def test_a_layout_takes_the_place_of_the_stored_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    negated, layer, x = Negated(monkeypatch), linear(), torch.ones(1, 8)
    stored = layer.weight_packed.clone()
    assert torch.equal(layer(x), ~stored)
    layer(x)
    assert negated.packed == 1
    assert layer._buffers["weight_packed"] is None
    assert list(layer.state_dict()) == ["weight_packed", "weight_scale", "weight_shape"]
    assert torch.equal(layer.state_dict()["weight_packed"], stored)
    assert torch.equal(layer.dequantize(), reference_of(layer, stored).dequantize())  # from the layout
    layer.unpack()
    assert torch.equal(layer.weight_packed, stored)
    assert layer.runtime is None
    layer.unpack()  # nothing left to do
    assert torch.equal(layer(x), ~stored)
    assert negated.packed == 2


def reference_of(layer: QuantLinear, stored: Tensor) -> QuantLinear:
    plain = linear()
    plain.load_state_dict({**layer.state_dict(), "weight_packed": stored})
    return plain


def test_what_moves_is_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    negated, x = Negated(monkeypatch), torch.ones(1, 8)
    layer = linear()
    stored = layer.weight_packed.clone()
    layer(x)
    layer.half()
    assert torch.equal(layer.weight_packed, stored)
    assert torch.equal(layer(x.half()), ~stored)
    assert negated.packed == 2
    assert layer.to("meta").weight_packed.is_meta


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_hold_what_is_stored(monkeypatch: pytest.MonkeyPatch, again: Any) -> None:
    layer = linear("W4A8")
    stored = layer.weight_packed.clone()
    dispatch.prepare(layer)
    twin = again(layer)
    assert twin.runtime is None
    assert torch.equal(twin.weight_packed, stored)
    assert torch.equal(twin(torch.ones(1, 8)), layer(torch.ones(1, 8)))


def test_other_tensors_are_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    negated, x = Negated(monkeypatch), torch.ones(1, 8)
    layer, other = linear(), linear()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), ~other.weight_packed)
    layer.weight_packed = torch.zeros_like(other.weight_packed)
    assert torch.equal(layer(x), ~torch.zeros_like(other.weight_packed))
    packed = negated.packed
    layer.weight_scale = layer.weight_scale.clone()  # the layout may have held the old ones
    assert torch.equal(layer(x), ~torch.zeros_like(other.weight_packed))
    assert negated.packed == packed + 1


def test_a_layout_beside_the_stored_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    Negated(monkeypatch, restores=False)
    layer = linear()
    stored = layer.weight_packed
    assert torch.equal(layer(torch.ones(1, 8)), ~stored)
    assert layer.weight_packed is stored


def test_tensors_that_a_layout_turns_down(monkeypatch: pytest.MonkeyPatch) -> None:
    negated, layer = Negated(monkeypatch, packs=False), linear()
    stored, x = layer.weight_packed, torch.ones(1, 8)
    assert dispatch.choose(x, layer) is dispatch.choose(x, layer) is REFERENCE
    assert layer.weight_packed is stored
    assert negated.packed == 1


@pytest.mark.parametrize("hook", [{"offload": True}, {"hooks": (SimpleNamespace(offload=True),)}])
def test_offloaded_weights_are_not_packed(monkeypatch: pytest.MonkeyPatch, hook: dict[str, Any]) -> None:
    negated, layer = Negated(monkeypatch), linear()
    layer._hf_hook = SimpleNamespace(**hook)  # type: ignore[assignment]  # as accelerate leaves it
    assert dispatch.choose(torch.ones(1, 8), layer) is REFERENCE
    assert layer.runtime is None  # nothing holds on to tensors that are to go
    layer._hf_hook = SimpleNamespace(offload=False)  # type: ignore[assignment]
    layer.unpack()
    assert dispatch.choose(torch.ones(1, 8), layer).name == "negated"
    assert negated.packed == 1


def test_gradients_go_through_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear("W4A8")
    dispatch.prepare(layer)
    x = torch.randn(3, 8, requires_grad=True)
    assert dispatch.choose(x, layer) is REFERENCE
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantize().sum(dim=0).expand(3, 8))
    with torch.no_grad():
        taken = dispatch.choose(x, layer)
    assert (taken is REFERENCE) == (layer.runtime is None or layer.runtime.layout is None)


def test_only_the_reference_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    negated, layer = Negated(monkeypatch), linear()
    with dispatch.only_reference():
        assert dispatch.choose(torch.ones(1, 8), layer) is REFERENCE
        dispatch.prepare_all(layer)
        assert not negated.packed
    with pytest.raises(ZeroDivisionError), dispatch.only_reference():
        raise ZeroDivisionError
    assert dispatch.choose(torch.ones(1, 8), layer).name == "negated"
    with dispatch.only_reference():  # from the layout
        assert torch.equal(layer(torch.ones(1, 8)), reference.linear(torch.ones(1, 8), layer))


def test_another_dtype_is_an_error_in_one_line() -> None:
    layer = linear(dtype=torch.float16)
    with pytest.raises(QuantkitError, match=r"input is torch.bfloat16 .* \(8 -> 4\) are torch.float16: convert"):
        layer(torch.ones(1, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear()(torch.ones(1, 8, dtype=torch.bfloat16)).shape == (1, 4)


def test_what_the_machine_lacks_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    layout = Layout("never", lambda layer: None, None)
    old = row("old", refuses=lambda layer, device: Lacking("for sm_80 and later"), layout=layout)
    odd = row("odd", refuses=lambda layer, device: "groups of 8", layout=layout)
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (odd, old, REFERENCE))
    model = torch.nn.Sequential(linear(), linear())
    dispatch.prepare_all(model)
    model[0](torch.ones(1, 8))
    (said,) = caplog.messages  # nothing about groups: that is the layer's doing
    assert said.startswith("cpu: for sm_80 and later; quantised layers")
    model.half()  # packed anew, and nothing new about it
    model[0](torch.ones(1, 8, dtype=torch.float16))
    assert len(caplog.messages) == 1


def test_nothing_is_said_where_another_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    Negated(monkeypatch)
    old = row("old", refuses=lambda layer, device: Lacking("for sm_80 and later"))
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (old, *dispatch.IMPLEMENTATIONS))
    dispatch.prepare(linear())
    assert not caplog.messages


def test_layers_without_data_are_left_alone() -> None:
    model = torch.nn.Sequential(QuantLinear(8, 4, False, layer_format("W4A8"), torch.float32, device="meta"), linear())
    dispatch.prepare_all(model)
    assert [part.runtime is not None for part in model] == [False, True]


def test_packed_in_inference_mode_and_trained_on_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    Negated(monkeypatch)
    layer = linear()
    with torch.inference_mode():
        layer(torch.ones(1, 8))
    layer.unpack()
    layer.weight_packed.zero_()
    assert not layer.weight_packed.is_inference()
