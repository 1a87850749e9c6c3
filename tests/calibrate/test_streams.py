"""The streams through all blocks are the whole model; the reference is a plain ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import Opened, sample_ids
from tiny_models import TINY
from torch import Tensor, nn

from quantkit.calibrate.streams import Streams


@torch.no_grad()
def assert_is_the_whole_model(model: Opened, padded: bool, **settings: Any) -> None:
    ids, mask = sample_ids(padded)
    expected = model.whole()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with Streams(model.stream, ids, attention_mask=mask, batch_size=2, **settings) as streams:
        for index in range(model.skeleton.num_blocks):
            streams.advance(dict.fromkeys(streams.states, model.block(index)))
        for name in streams.states:
            found = torch.cat([streams.logits(name, number) for number in range(streams.batches)])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", TINY)
def test_equals_the_whole_model(name: str, padded: bool, tiny: Callable[..., Path]) -> None:
    assert_is_the_whole_model(Opened(tiny(name)), padded)


def test_on_disk_with_both_streams(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert_is_the_whole_model(Opened(tiny("gemma3")), True, names=("float", "quantised"), max_bytes=0, folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_only_the_streams_asked_for(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    with Streams(model.stream, sample_ids(False)[0], names=("float",)) as streams:
        assert list(streams.states) == ["float"]
        with pytest.raises(ValueError, match=r"streams \['float'\] are carried, got outputs for \['quantised'\]"):
            streams.advance({"quantised": model.block(0)})


def test_streams_part_where_their_blocks_do(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    worse = model.block(0)
    worse.mlp.down_proj.weight.data.mul_(1.1)
    with Streams(model.stream, sample_ids(False)[0], names=("float", "quantised")) as streams:
        assert torch.equal(streams.hidden("float", 0), streams.hidden("quantised", 0))
        expected = streams.run("float", 0, model.block(0)), streams.run("quantised", 0, worse)
        streams.advance({"float": model.block(0), "quantised": worse})
        assert streams.block == 1
        assert torch.equal(streams.hidden("float", 0), expected[0])
        assert torch.equal(streams.hidden("quantised", 0), expected[1])
        assert not torch.equal(*expected)


def test_states_that_are_ready_become_the_stream(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Opened(tiny("llama"))
    with Streams(model.stream, sample_ids(False)[0], batch_size=2, max_bytes=0, folder=tmp_path) as streams:
        ready, old = streams.new_states(), streams.states["quantised"]
        for number in range(streams.batches):
            ready.replace(number, streams.run("quantised", number, model.block(0)))
        expected = ready.batch(2)
        streams.advance({"quantised": ready})
        assert torch.equal(streams.hidden("quantised", 2), expected)
        with pytest.raises(ValueError, match="closed"):
            old.batch(0)


def test_states_in_bfloat16_are_computed_with_in_float32(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    ids, _ = sample_ids(False)
    with Streams(model.stream, ids, dtype=torch.bfloat16) as narrow, Streams(model.stream, ids) as wide:
        assert narrow.states["quantised"].nbytes == wide.states["quantised"].nbytes / 2
        assert narrow.hidden("quantised", 0).dtype == torch.float32
        narrow.advance({"quantised": model.block(0)})
        wide.advance({"quantised": model.block(0)})
        difference = narrow.hidden("quantised", 0) - wide.hidden("quantised", 0)
        assert 0 < difference.norm() < 0.02 * wide.hidden("quantised", 0).norm()


class TestArguments:
    """What blocks are called with is kept once per shape and padding."""

    def test_shared_by_equal_batches(self, tiny: Callable[..., Path]) -> None:
        with Streams(Opened(tiny("gemma3")).stream, sample_ids(False)[0], batch_size=2) as streams:
            first, second, short = (streams.arguments(number) for number in range(3))
        assert first is second
        assert short is not first  # 5 samples in batches of 2: the last has another shape

    def test_not_shared_where_padding_differs(self, tiny: Callable[..., Path]) -> None:
        ids, mask = sample_ids(True)
        assert mask is not None
        mask = mask[[1, 0, 2, 3, 4]]
        with Streams(Opened(tiny("llama")).stream, ids, attention_mask=mask, batch_size=1) as streams:
            calls = [streams.arguments(number) for number in range(5)]
        assert calls[1] is calls[3]  # neither has padding
        assert len({id(call) for call in calls}) == 4

    def test_not_shared_where_they_follow_from_the_tokens(
        self, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in Gemma 3n, whose blocks are each handed embeddings of their own."""
        model = Opened(tiny("llama"))
        plain = model.stream.capture

        def capture(ids: Tensor, mask: Tensor | None = None) -> Any:
            captured = plain(ids, mask)
            captured.calls = [(args, kwargs | {"per_layer_input": ids * 2}) for args, kwargs in captured.calls]
            return captured

        monkeypatch.setattr(model.stream, "capture", capture)
        ids, _ = sample_ids(False)
        with Streams(model.stream, ids, batch_size=1) as streams:
            for number in range(5):
                assert torch.equal(streams.arguments(number)[1]["per_layer_input"], 2 * ids[number : number + 1])

    def test_gradients_flow_through_a_block_called_with_them(self, tiny: Callable[..., Path]) -> None:
        """Also when a run that is in inference mode made the streams: norm tweaking needs it."""
        model = Opened(tiny("llama"))
        with torch.inference_mode():
            streams = Streams(model.stream, sample_ids(False)[0])
        block = model.block(0)
        block.input_layernorm.weight.requires_grad_(True)
        args, kwargs = streams.arguments(0)
        block(streams.hidden("quantised", 0), *args, **kwargs).pow(2).sum().backward()
        assert block.input_layernorm.weight.grad.abs().min() > 0


def with_inf_for(sample: int, block: nn.Module) -> nn.Module:
    """``block`` with an output that is infinite at the first position of ``sample``."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output[sample, 0, 0] = torch.inf
        return output

    block.register_forward_hook(hook)
    return block


def test_a_sample_that_breaks_is_named_and_left_out(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    said: list[str] = []
    with Streams(model.stream, sample_ids(False)[0], batch_size=5, warn=said.append) as streams:
        streams.advance({"quantised": with_inf_for(3, model.block(0))})
        assert said == [
            "block 0: the output for calibration sample 3 (quantised stream) holds NaN or Inf; the sample is left out "
            "from here on."
        ]
        assert streams.broken == {3: 0}
        assert streams.token_mask(0).all(dim=1).tolist() == [True, True, True, False, True]
        streams.advance({"quantised": model.block(1)})
        assert len(said) == 1
        assert streams.hidden("quantised", 0).isfinite().all()


def test_broken_padding_breaks_nothing(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    ids, mask = sample_ids(True)
    with Streams(model.stream, ids, attention_mask=mask, batch_size=5) as streams:
        streams.advance({"quantised": with_inf_for(2, model.block(0))})  # sample 2 begins with padding
        assert streams.broken == {}
