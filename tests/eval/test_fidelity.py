"""The divergence is that of a direct computation over all logits; from itself a model has exactly none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import TINY, make_tiny
from tiny_tokenizer import TEXT, VOCABULARY, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from quantkit.calibrate.text import Text
from quantkit.errors import QuantkitError
from quantkit.eval.fidelity import divergence, fidelity, other_tokens
from quantkit.eval.generation import generation_agreement, greedy
from quantkit.eval.perplexity import perplexity

LONG = Text("long", tuple(f"{n}. {TEXT}" for n in range(12)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny(TINY["llama"](vocab_size=VOCABULARY))


def shaken(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """A copy with noise of that size, relative to each weight matrix, in the blocks."""
    other = make_tiny(type(model.config)(**model.config.to_dict()))
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            if "layers" in name and tensor.dim() == 2:
                tensor += by * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def other(model: PreTrainedModel) -> PreTrainedModel:
    return shaken(model, 0.2)


@torch.no_grad()
def directly(baseline: Any, model: Any, ids: list[int], seqlen: int) -> tuple[list[list[float]], float]:
    """KL(baseline || model) of every predicted token by torch's own formula, and the top-1 agreement; in float64."""
    rows, same, count = [], 0, 0
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = torch.tensor([ids[start : start + seqlen]])
        p, q = (one(window).logits[0, :-1].double() for one in (baseline, model))
        kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
        rows.append(kl.sum(-1).tolist())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += seqlen - 1
    return rows, same / count


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_a_direct_computation(
    monkeypatch: pytest.MonkeyPatch, model: Any, other: Any, tokenizer: Any, batch_size: int
) -> None:
    monkeypatch.setattr("quantkit.eval.fidelity.ROWS_PER_CHUNK", 7)  # 31 predictions: the last chunk is short
    found = fidelity(other, tokenizer, model, tokenizer, LONG, seqlen=32, batch_size=batch_size)
    ids = tokenizer(LONG.joined, add_special_tokens=False)["input_ids"]
    rows, same = directly(model, other, ids, 32)
    got = found.divergence
    assert got is not None
    assert found.why_not == ""
    flat = sorted(one for row in rows for one in row)
    assert got.kl == pytest.approx(sum(flat) / len(flat), rel=1e-6)
    assert got.kl > 1e-4
    assert got.kl_largest == pytest.approx(flat[-1], rel=1e-6)
    assert got.kl_99 == pytest.approx(flat[math.ceil(0.99 * len(flat)) - 1], rel=1e-6)
    assert got.top1_agreement == same < 1
    backwards, _ = directly(other, model, ids, 32)  # KL is not symmetric: the other way round is another number
    assert got.kl != pytest.approx(sum(sum(row) for row in backwards) / len(flat), rel=1e-4)


def test_perplexities_are_those_of_the_two_models(model: Any, other: Any, tokenizer: Any) -> None:
    found = fidelity(other, tokenizer, model, tokenizer, LONG, seqlen=32, max_tokens=400, bos=True)
    alone = [perplexity(one, tokenizer, LONG, seqlen=32, max_tokens=400, bos=True) for one in (other, model)]
    assert found.perplexity.value == pytest.approx(alone[0].value, rel=1e-6)
    assert found.baseline_perplexity.value == pytest.approx(alone[1].value, rel=1e-6)
    assert (found.perplexity.tokens, found.perplexity.protocol) == (alone[0].tokens, alone[0].protocol)
    assert found.divergence is not None
    ratio = found.divergence.perplexity_ratio
    assert ratio.value == pytest.approx(alone[0].value / alone[1].value, rel=1e-6)
    assert ratio.low < ratio.value < ratio.high


def test_a_model_beside_itself(model: Any, tokenizer: Any) -> None:
    found = fidelity(model, tokenizer, model, tokenizer, LONG, seqlen=32, max_tokens=256, prompts=2).divergence
    assert found is not None
    assert (found.kl, found.kl_largest, found.top1_agreement, found.worst) == (0.0, 0.0, 1.0, ())
    assert found.perplexity_ratio == (1.0, 1.0, 1.0)
    assert found.generation is not None
    assert (found.generation.matched, found.generation.identical) == (found.generation.new_tokens, 2)


def test_the_interval_contains_the_ratio_on_more_text(model: Any, other: Any, tokenizer: Any) -> None:
    whole = Text("whole", tuple(f"{n} {TEXT[n % 40 :]}" for n in range(60)))
    truth = fidelity(other, tokenizer, model, tokenizer, whole, seqlen=16, batch_size=64).divergence
    part = fidelity(other, tokenizer, model, tokenizer, whole, seqlen=16, max_tokens=640, batch_size=64).divergence
    assert truth is not None
    assert part is not None
    assert part.perplexity_ratio.low < truth.perplexity_ratio.value < part.perplexity_ratio.high


def test_no_divergence_is_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(500, 50, generator=generator, dtype=torch.float64)
    nearly = logits + 1e-9 * torch.randn(500, 50, generator=generator, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1), nearly.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).min() < 0  # what rounding leaves without care
    assert divergence(log_p, log_q).min() == 0


def test_what_the_baseline_excludes_costs_nothing() -> None:
    log_p = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    both = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    assert divergence(log_p, both).item() == pytest.approx(math.log(2))
    assert divergence(log_p, log_p).item() == 0
    assert divergence(both, log_p).item() == math.inf


def test_the_worst_windows_are_shown(model: Any, other: Any, tokenizer: Any) -> None:
    found = fidelity(other, tokenizer, model, tokenizer, LONG, seqlen=32).divergence
    assert found is not None
    ids = tokenizer(LONG.joined, add_special_tokens=False)["input_ids"]
    rows, _ = directly(model, other, ids, 32)
    order = sorted(range(len(rows)), key=lambda number: -sum(rows[number]))
    assert [one.number - 1 for one in found.worst] == order[:3]
    worst, number = found.worst[0], order[0]
    place = max(range(31), key=lambda at: rows[number][at])
    window = ids[32 * number : 32 * number + 32]
    assert worst.kl == pytest.approx(sum(rows[number]) / 31, rel=1e-6)
    assert worst.token_kl == pytest.approx(rows[number][place], rel=1e-6)
    assert worst.text == tokenizer.decode(window[: place + 1])
    assert worst.token == tokenizer.decode(window[place + 1 : place + 2])
    with torch.no_grad():
        said = [int(one(torch.tensor([window])).logits[0, place].argmax()) for one in (other, model)]
    assert [worst.model_says, worst.baseline_says] == [tokenizer.decode([token]) for token in said]


def test_bits_per_byte(model: Any, tokenizer: Any) -> None:
    found = fidelity(model, tokenizer, model, tokenizer, LONG, seqlen=32)
    ids = tokenizer(LONG.joined, add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    number = sum(len(tokenizer.decode(window[1:]).encode()) for window in windows)
    bits = math.log2(found.perplexity.value) * 31 * len(windows)
    assert found.bits_per_byte == found.baseline_bits_per_byte == pytest.approx(bits / number, rel=1e-9)


def words(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_another_tokenizer_has_no_divergence_but_bits_per_byte(model: Any, tokenizer: Any) -> None:
    own = words({"?": 0} | {word: n for n, word in enumerate(sorted(set(LONG.joined.split())), start=1)})
    baseline = make_tiny(TINY["opt"](vocab_size=len(own)))
    found = fidelity(model, tokenizer, baseline, own, LONG, seqlen=16, prompts=2)
    assert found.divergence is None
    assert found.why_not == f"the model's tokenizer has 320 tokens and the baseline's has {len(own)}"
    assert found.perplexity.value == pytest.approx(perplexity(model, tokenizer, LONG, seqlen=16).value, rel=1e-9)
    assert found.baseline_perplexity.value == pytest.approx(perplexity(baseline, own, LONG, seqlen=16).value, rel=1e-9)
    spoken = LONG.joined.split()[: found.baseline_perplexity.windows * 16]
    number = sum(len(f" {word}") for place, word in enumerate(spoken) if place % 16)  # less the first of each window
    bits = math.log2(found.baseline_perplexity.value) * found.baseline_perplexity.tokens
    assert found.baseline_bits_per_byte == pytest.approx(bits / number, rel=1e-9)


def test_why_tokens_cannot_be_compared(model: Any) -> None:
    a, b = words({"?": 0, "a": 1, "b": 2}), words({"?": 0, "a": 2, "b": 1})
    assert (
        other_tokens(model, a, model, b)
        == "the tokenizers differ: 'a' is token 1 of the model's and 2 of the baseline's"
    )
    padded = make_tiny(TINY["llama"](vocab_size=VOCABULARY + 64))
    assert other_tokens(padded, a, model, a) == "the model has 384 logits and the baseline has 320"
    assert other_tokens(model, a, model, a) == ""


def test_windows_fit_the_model_with_fewer_positions(model: Any, tokenizer: Any) -> None:
    short = make_tiny(TINY["llama"](vocab_size=VOCABULARY, max_position_embeddings=48))
    for sides in ((short, model), (model, short)):
        assert fidelity(sides[0], tokenizer, sides[1], tokenizer, LONG, max_tokens=200).perplexity.seqlen == 48


def test_which_of_the_two_is_broken(model: Any, tokenizer: Any) -> None:
    broken = shaken(model, 0.0)
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    with pytest.raises(QuantkitError, match="the baseline's logits on windows 1 to 2 of long are not finite"):
        fidelity(model, tokenizer, broken, tokenizer, LONG, seqlen=32, batch_size=2)
    with pytest.raises(QuantkitError, match="the model's logits on windows 1 to 2 of long are not finite"):
        fidelity(broken, tokenizer, model, tokenizer, LONG, seqlen=32, batch_size=2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_greedy_writes_what_a_model_without_cache_would(name: str) -> None:
    model = make_tiny(TINY[name](vocab_size=VOCABULARY))
    ids = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    got = greedy(model, ids, 6)
    assert got.shape == (3, 6)
    for tokens in got.T:
        with torch.no_grad():
            assert torch.equal(tokens, model(ids, use_cache=False).logits[:, -1].argmax(dim=-1))
        ids = torch.cat([ids, tokens[:, None]], dim=1)


def test_agreement_counts_up_to_the_first_difference(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    answers = {
        0: ([1, 2, 3, 4], [1, 2, 9, 4]),  # 2, although the last agrees again
        2: ([5, 6, 7, 8], [5, 6, 7, 8]),  # 4
        4: ([0, 0, 0, 0], [1, 0, 0, 0]),  # 0
    }
    other = object()

    def written(one: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        assert (prompts.shape[1], new_tokens) == (4, 4)
        return torch.tensor([answers[int(prompt[0])][one is other] for prompt in prompts])

    monkeypatch.setattr("quantkit.eval.generation.greedy", written)
    monkeypatch.setattr("quantkit.eval.generation.PROMPTS_AT_ONCE", 2)
    windows = torch.arange(6)[:, None].expand(6, 8)
    steps: list[tuple[str, int, int]] = []
    found = generation_agreement(model, other, windows, prompts=3, on_progress=lambda *event: steps.append(event))  # type: ignore[arg-type]
    assert (found.prompts, found.prompt_tokens, found.new_tokens) == (3, 4, 4)
    assert (found.matched, found.identical) == (2.0, 1)
    assert steps == [("continuations", 2, 3), ("continuations", 3, 3)]
