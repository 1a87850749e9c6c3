"""Linears that read one tensor change it once, and nothing else about them changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from looked import save_source
from torch import Tensor

import quantkit
from quantkit.kernels import reference
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.sharing import SharedInput, share_inputs
from quantkit.verify import probe_ids

ONCE = {
    # Calls of ``transform_input`` per block: distinct inputs of linears, experts' gate and up together.
    "llama": 4, "qwen3": 4, "opt": 4, "gpt_neox": 4, "phi3": 4, "bloom": 4,
}  # fmt: skip


@pytest.fixture
def quantised(tmp_path: Path) -> Callable[..., torch.nn.Module]:
    def make(name: str) -> torch.nn.Module:
        recipe = {"scheme": "W4A4", "steps": [{"method": "hadamard", "options": {"residual": "never"}}, "rtn"]}
        quantkit.quantize(str(save_source(name, tmp_path)), output=tmp_path / "out", recipe=recipe, overwrite=True)
        return quantkit.load(tmp_path / "out")[0]

    return make


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(probe_ids(model.config.vocab_size)).logits
    return found


def apart(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.shared_input = None
    return model


@pytest.mark.parametrize("name", [*ONCE, "mixtral", "qwen2_moe", "bert"])
def test_one_change_for_all_readers_and_the_same_logits(
    quantised: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = quantised(name)
    calls: Counter[str] = Counter()
    change = reference.transform_input

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls["all"] += 1
        return change(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "transform_input", counted)
    together, shared = logits(model), calls.pop("all")
    linked = [m for m in model.modules() if isinstance(m, QuantLinear) and m.shared_input is not None]
    assert all(module.shared_input._last is None for module in linked)  # type: ignore[union-attr]
    assert torch.equal(together, logits(apart(model)))
    if name in ONCE:
        assert shared == ONCE[name] * model.config.num_hidden_layers
    fused = name in ("gpt_neox", "phi3", "bloom")
    assert (shared < calls["all"]) == bool(linked) == (not fused)


def test_what_is_not_alike_is_not_shared(quantised: Callable[..., torch.nn.Module]) -> None:
    model = apart(quantised("llama"))
    attention = model.model.layers[0].self_attn
    attention.k_proj.input_hadamard_signs.neg_()
    share_inputs(model)
    assert attention.k_proj.shared_input is None
    assert attention.q_proj.shared_input is attention.v_proj.shared_input is not None
    assert attention.q_proj.shared_input is not model.model.layers[1].self_attn.q_proj.shared_input
    assert attention.o_proj.shared_input is None


def test_nothing_is_shared_where_nothing_is_done(tmp_path: Path) -> None:
    quantkit.quantize(str(save_source("llama", tmp_path)), output=tmp_path / "out", method="rtn", scheme="W4A16G32")
    model, _ = quantkit.load(tmp_path / "out")
    assert all(module.shared_input is None for module in model.modules() if isinstance(module, QuantLinear))


@pytest.mark.parametrize("inference", [False, True])
def test_kept_for_this_very_tensor_and_no_longer(inference: bool) -> None:
    made = []

    def of(x: Tensor) -> Tensor:
        def make() -> Tensor:
            made.append(x)
            return x + 1

        return shared.of(x, make)

    with torch.inference_mode(inference):
        shared, x = SharedInput(3), torch.zeros(2)
        assert of(x) is of(x)
        assert len(made) == 1
        other = x.clone()
        of(other)
        assert len(made) == 2
        of(x)  # the readers of the other one stopped half way
        assert len(made) == 3
        of(x)
        of(x)
        assert shared._last is None
        of(x)
        assert len(made) == 4
        if not inference:
            x.add_(1)
            assert torch.equal(of(x), torch.full((2,), 2.0))


def test_integers_are_shared_apart_from_values() -> None:
    """A layer whose kernel takes codes and one whose kernel takes values may read one tensor in turns."""
    shared, x = SharedInput(3), torch.ones(2)
    made: list[str] = []

    def make(kind: str) -> Callable[[], str]:
        return lambda: made.append(kind) or kind  # type: ignore[func-returns-value]

    assert [shared.of(x, make(kind), kind) for kind in ("codes", "codes", "values")] == ["codes", "codes", "values"]
    assert made == ["codes", "values"]
    assert shared.of(torch.zeros(2), make("codes"), "codes") == "codes"
    assert made == ["codes", "values", "codes"]


def _unasked() -> str:
    raise AssertionError("made a second time")


def test_what_is_offered_is_made_by_no_reader() -> None:
    shared, x = SharedInput(2), torch.ones(2)
    for _ in range(2):
        assert shared.offer(x, "offered", "codes")
        assert [shared.of(x, _unasked, "codes") for _ in range(2)] == ["offered"] * 2
        assert shared._last is None
    assert shared.offer(x, "offered", "codes")
    assert shared.of(x, lambda: "made", "values") == "made"
    assert shared.offer(x, "offered", "codes")  # it was taken before
    x.add_(1)
    assert shared.of(x, lambda: "made", "codes") == "made"


def test_what_nobody_takes_is_not_offered_for_ever() -> None:
    """Not even where two readers share what one of them made of another tensor."""
    shared, x = SharedInput(2), torch.ones(2)
    assert shared.offer(x, "offered", "codes")
    other = x.clone()
    assert [shared.of(other, lambda: "made", "codes") for _ in range(2)] == ["made"] * 2
    assert not shared.offer(x, "offered", "codes")
    assert shared._last is None
