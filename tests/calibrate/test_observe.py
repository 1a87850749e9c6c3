"""What the block loop sees is what hooks on the whole model see, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import Opened, sample_ids
from tiny_models import TINY
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig

from quantkit.calibrate.observe import BlockStatistics, observe
from quantkit.calibrate.statistics import Want
from quantkit.calibrate.streams import Streams

PLAIN: tuple[Want, ...] = ("range", "mean", "tokens", "rows", "hessian")


@torch.no_grad()
def inputs_of_the_whole(model: Opened, index: int, padded: bool) -> dict[str, Tensor]:
    """Module path in block ``index`` -> rows [tokens that are not padding, width] that enter it."""
    ids, mask = sample_ids(padded)
    real = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()
    whole, found = model.whole(), dict[str, Tensor]()
    block: Any = whole.get_submodule(model.skeleton.block_prefix(index).rstrip("."))
    names = model.skeleton.expert_names

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1])[real]

        return hook

    def keep_experts(path: str) -> Callable[..., None]:
        def hook(experts: Any, args: tuple[Tensor, ...]) -> None:
            hidden, chosen, _ = args
            for expert in range(experts.num_experts):
                x = hidden[(chosen == expert).any(dim=1) & real]
                gate, up = (x @ experts.gate_up_proj[expert].t()).chunk(2, dim=1)
                found[f"{path}.{expert}.{names.gate}"] = found[f"{path}.{expert}.{names.up}"] = x
                found[f"{path}.{expert}.{names.down}"] = experts.act_fn(gate) * up

        return hook

    for name in model.readers(index):
        if ".experts." not in name:
            block.get_submodule(name).register_forward_pre_hook(keep(name))
    for path, part in block.named_modules():
        if path.endswith("experts"):
            part.register_forward_pre_hook(keep_experts(path))
    whole(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


def seen_in_the_loop(model: Opened, index: int, padded: bool, **options: Any) -> BlockStatistics:
    ids, mask = sample_ids(padded)
    with Streams(model.stream, ids, attention_mask=mask, batch_size=2) as streams:
        for earlier in range(index):
            streams.advance({"quantised": model.block(earlier)})
        options = {"names": model.readers(index), "want": PLAIN, "experts": model.skeleton.expert_names} | options
        return observe(streams, model.block(index), **options)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", TINY)
def test_equals_hooks_on_the_whole_model(name: str, padded: bool, tiny: Callable[..., Path]) -> None:
    model = Opened(tiny(name))
    expected = inputs_of_the_whole(model, 1, padded)
    statistics = seen_in_the_loop(model, 1, padded)
    assert set(statistics.inputs) == set(expected) == set(model.readers(1))
    assert not statistics.nonfinite
    for path, x in expected.items():
        found, exact = statistics.inputs[path], x.double()
        assert found.tokens == len(x)
        if not len(x):
            continue
        close(found.minimum, exact.amin(dim=0))
        close(found.maximum, exact.amax(dim=0))
        close(found.mean, exact.mean(dim=0))
        close(found.absmean, exact.abs().mean(dim=0))
        close(found.hessian, 2 / len(x) * exact.t() @ exact)
        if ".experts." not in path:  # the rows of an expert come in another order
            close(found.token_absmax, exact.abs().amax(dim=1))
            close(found.rows, exact)


SHARED = {
    "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["fc1"], ["fc2"]],
    "bloom": [["self_attention.query_key_value"], ["mlp.dense_h_to_4h"]],
    "mixtral": [[f"mlp.experts.{expert}.w1", f"mlp.experts.{expert}.w3"] for expert in range(5)]
    + [[f"mlp.experts.{expert}.w2"] for expert in range(5)],
    "qwen2_moe": [["mlp.gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"]],
}


@pytest.mark.parametrize("name", SHARED)
def test_readers_of_one_tensor_share_one_object(name: str, tiny: Callable[..., Path]) -> None:
    model = Opened(tiny(name))
    statistics = seen_in_the_loop(model, 1, False, want=["range"])
    for group in SHARED[name]:
        for path in group:
            assert sorted(statistics.shared_by(path)) == sorted(group)


@pytest.mark.parametrize("name", TINY)
def test_a_site_is_seen_by_all_its_tokens(name: str, tiny: Callable[..., Path]) -> None:
    """Also in front of a mixture, where every expert sees a part."""
    model = Opened(tiny(name))
    statistics = seen_in_the_loop(model, 1, True)
    real = int(sample_ids(True)[1].sum())  # type: ignore[union-attr]
    sites = model.skeleton.sites(1)
    assert sites
    for site in sites:
        tokens = statistics.of_site(site).tokens
        assert tokens <= real if ".experts." in site.name else tokens == real


def test_tokens_of_experts_add_up(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("mixtral"))
    statistics = seen_in_the_loop(model, 1, True)
    real = int(sample_ids(True)[1].sum())  # type: ignore[union-attr]
    assert sum(statistics.inputs[f"mlp.experts.{expert}.w2"].tokens for expert in range(5)) == 2 * real


def test_an_expert_that_no_token_chose(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("mixtral"))
    with Streams(model.stream, sample_ids(False)[0]) as streams:
        block = model.block(0)
        block.mlp.gate.weight[2] = 0
        block.mlp.gate.weight[2] -= 50 * block.post_attention_layernorm.weight.sign()
        block.post_attention_layernorm.register_forward_hook(lambda _, args, output: output.abs())  # never chosen now
        statistics = observe(streams, block, model.linears(0), PLAIN, experts=model.skeleton.expert_names)
    unseen = statistics.inputs["mlp.experts.2.w2"]
    assert unseen.tokens == 0
    assert torch.equal(unseen.hessian, torch.zeros(40, 40))


def test_the_block_is_left_as_it_was(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Opened(tiny("mixtral"))
    block = model.block(0)
    modules = dict(block.named_modules())
    with Streams(model.stream, sample_ids(False)[0]) as streams:
        before = streams.run("quantised", 0, block)
        observe(streams, block, model.readers(0), PLAIN, experts=model.skeleton.expert_names)
        assert dict(block.named_modules()) == modules
        assert not any(part._forward_pre_hooks for part in block.modules())
        assert torch.equal(streams.run("quantised", 0, block), before)
        assert streams.block == 0
        monkeypatch.setattr(streams, "token_mask", None)  # fails inside
        with pytest.raises(TypeError):
            observe(streams, block, model.readers(0), PLAIN, experts=model.skeleton.expert_names)
        assert dict(block.named_modules()) == modules


def test_first_positions_count_for_the_hessian_only(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    path = "mlp.down_proj"
    x = inputs_of_the_whole(model, 1, True)[path].double()
    _, mask = sample_ids(True)
    assert mask is not None
    body = (mask.cumsum(dim=1) > 2)[mask.bool()]  # behind the padding, sample by sample
    found = seen_in_the_loop(model, 1, True, skip_first=2).inputs[path]
    assert found.tokens == len(x)
    close(found.hessian, 2 / len(x) * x.t() @ x)
    close(found.mean, x[body].mean(dim=0))
    close(found.maximum, x[body].amax(dim=0))
    close(found.rows, x[body])


def test_inputs_sample_the_same_tokens(tiny: Callable[..., Path]) -> None:
    model = Opened(tiny("llama"))
    whole = inputs_of_the_whole(model, 1, False)
    statistics = seen_in_the_loop(model, 1, False, max_rows=7, seed=3)
    tokens = statistics.inputs["mlp.down_proj"].row_tokens
    assert len(tokens) == 7
    for path, found in statistics.inputs.items():
        assert torch.equal(found.row_tokens, tokens)
        close(found.rows, whole[path][tokens].double())
    other = seen_in_the_loop(model, 1, False, max_rows=7, seed=4)
    assert not torch.equal(other.inputs["mlp.down_proj"].row_tokens, tokens)


def parted(model: Opened, streams: Streams) -> None:
    """Take the streams behind block 0, the quantised one through worse weights."""
    worse = model.block(0)
    for parameter in worse.parameters():
        parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    streams.advance({"float": model.block(0), "quantised": worse})


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3_moe"])
def test_cross_compares_the_streams_token_by_token(name: str, tiny: Callable[..., Path]) -> None:
    model = Opened(tiny(name))
    ids, mask = sample_ids(True)
    names = model.skeleton.expert_names
    with Streams(model.stream, ids, attention_mask=mask, batch_size=2, names=("float", "quantised")) as streams:
        parted(model, streams)
        seen: dict[str, BlockStatistics] = {}
        for stream in "float", "quantised":
            seen[stream] = observe(streams, model.block(1), model.readers(1), PLAIN, experts=names, stream=stream)
        found = observe(streams, model.block(1), model.readers(1), ["cross", "hessian"], experts=names)
    for path, statistics in found.inputs.items():
        reference, observed = seen["float"].inputs[path], seen["quantised"].inputs[path]
        # Of an expert, the tokens that both streams sent there; all rows fit into the sample.
        pairs = (reference.row_tokens[:, None] == observed.row_tokens).nonzero()
        x = observed.rows.double()
        drift = torch.zeros_like(x)
        drift[pairs[:, 1]] = reference.rows[pairs[:, 0]].double() - x[pairs[:, 1]]
        expected = 2 / max(len(x), 1) * drift.t() @ x
        if ".experts." not in path:
            assert expected.norm() > 1e-3
        torch.testing.assert_close(
            statistics.cross.double(), expected, rtol=0, atol=2e-5 * float(1e-30 + x.abs().max() ** 2 * 2)
        )
        torch.testing.assert_close(statistics.hessian, observed.hessian)


def test_outputs_are_those_of_the_block(tiny: Callable[..., Path]) -> None:
    """One forward gives a method its statistics, its targets and the next block's inputs."""
    model = Opened(tiny("llama"))
    with Streams(model.stream, sample_ids(False)[0], batch_size=2, names=("float", "quantised")) as streams:
        parted(model, streams)
        outputs = {name: streams.new_states() for name in streams.states}
        observe(streams, model.block(1), model.linears(1), ["cross"], outputs=outputs)
        for name, states in outputs.items():
            for number in range(streams.batches):
                assert torch.equal(states.batch(number), streams.run(name, number, model.block(1)))


class TestNonfinite:
    def test_inside_a_block(self, tiny: Callable[..., Path]) -> None:
        """Sample 3 overflows in the MLP: its rows are missing there, and there only."""
        model = Opened(tiny("llama"))
        with Streams(model.stream, sample_ids(False)[0], batch_size=2) as streams:
            block = model.block(0)
            block.mlp.act_fn = BreaksAt(call=1, sample=1)
            found = observe(streams, block, model.linears(0), PLAIN)
            assert found.nonfinite == {"mlp.down_proj": {3}}
            assert found.inputs["mlp.down_proj"].tokens == 4 * 9
            assert found.inputs["mlp.down_proj"].hessian.isfinite().all()
            assert 3 not in found.inputs["mlp.down_proj"].row_tokens // 9
            assert found.inputs["mlp.up_proj"].tokens == 5 * 9

    def test_samples_that_broke_before(self, tiny: Callable[..., Path]) -> None:
        model = Opened(tiny("llama"))
        with Streams(model.stream, sample_ids(False)[0], warn=lambda text: None) as streams:
            block = model.block(0)
            block.mlp.act_fn = BreaksAt(call=0, sample=2)
            streams.advance({"quantised": block})
            assert streams.broken == {2: 0}
            found = observe(streams, model.block(1), model.linears(1), PLAIN)
            assert found.nonfinite == {}
            assert {statistics.tokens for statistics in found.inputs.values()} == {4 * 9}


class BreaksAt(nn.SiLU):
    """An activation whose output for one sample of one call is not a number."""

    def __init__(self, call: int, sample: int) -> None:
        super().__init__()
        self.calls, self.call, self.sample = 0, call, sample

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.calls == self.call:
            output[self.sample, 4, 1] = torch.nan
        self.calls += 1
        return output


def test_architectures_without_a_table(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=199, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = Opened(tmp_path)
    expected = inputs_of_the_whole(model, 1, False)
    statistics = seen_in_the_loop(model, 1, False)
    assert len(expected) == 4
    for path, x in expected.items():
        close(statistics.inputs[path].hessian, 2 / len(x) * x.double().t() @ x.double())


def test_collected_in_inference_mode_and_worked_on_outside(tiny: Callable[..., Path]) -> None:
    with torch.inference_mode():
        statistics = seen_in_the_loop(Opened(tiny("llama")), 0, False)
    hessian = statistics.inputs["mlp.down_proj"].hessian
    hessian.diagonal().add_(1.0)
    assert not hessian.is_inference()
