"""A score is the one that plain lm-eval gives the same model, to the last digit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="tasks are lm-eval's: pip install 'quantkit[eval]'")

import quantkit
from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.bench_blimp import dequantised
from quantkit.eval.streaming import streamed_logits
from quantkit.eval.tasks import Tasks, load_tasks
from quantkit.eval.zero_shot import ZeroShot, check_output_path, language_model, zero_shot
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import set_kv
from quantkit.layers.quant_linear import QuantLinear

pytestmark = pytest.mark.slow  # importing lm-eval takes many seconds

TEMPLATE = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
}
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["quick brown", "lazy", "it"],
        "training_split": "train",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "guess": {"output_type": "loglikelihood", "doc_to_target": " fox", "metric_list": [{"metric": "perplexity"}]},
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}"},
    "write": {
        "output_type": "generate_until",
        "doc_to_target": "jumps",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of every kind of request, with nine documents."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    for split in ("train", "test"):
        lines = [{"question": " ".join(words[n % 3 : n]) + f" {split}", "answer": n % 3} for n in range(1, 10)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    for name, task in TASKS.items():
        definition = TEMPLATE | {"task": name, "dataset_kwargs": {"data_files": files}} | task
        (folder / f"{name}.yaml").write_text(json.dumps(definition))
    group = {
        "group": "both",
        "task": ["choose", "write"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }
    (folder / "both.yaml").write_text(json.dumps(group))
    return folder


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, definitions: Path) -> Callable[..., Tasks]:
    """``tasks(name, ...)``: of ``definitions``, without a look at lm-eval's own."""
    from quantkit.eval.tasks import _Library

    monkeypatch.setattr(_Library, "_texts", {})
    return lambda *names: load_tasks(names, include_path=definitions)


@pytest.fixture(scope="module")
def quantised(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A packed model and its tokenizer."""
    folder = tmp_path_factory.mktemp("quantised") / "out"
    quantkit.quantize(str(source("llama")), method="rtn", scheme="W4A16G32", output=str(folder))
    return quantkit.load(folder)


def plainly(model: Any, tokenizer: Any, tasks: Tasks, **settings: Any) -> Any:
    """lm-eval by itself: its wrapper, its function."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3)
    return simple_evaluate(model=wrapped, tasks=list(tasks.chosen), task_manager=tasks.manager, **settings)


@pytest.mark.parametrize("settings", [{}, {"num_fewshot": 2, "limit": 5}], ids=["all", "shots"])
def test_equals_plain_lm_eval(
    tasks: Callable[..., Tasks], quantised: tuple[Any, Any], settings: dict[str, Any]
) -> None:
    model, tokenizer = quantised
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    before = len(tokenizer)
    chosen = tasks("both", "guess", "roll")
    got = zero_shot(model, tokenizer, chosen, name="tiny", batch_size=3, **settings)
    want = plainly(model, tokenizer, tasks("both", "guess", "roll"), **settings)
    assert got.results["results"] == want["results"]
    for key in ("groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better"):
        assert got.results[key] == want[key]
    for task, samples in want["samples"].items():
        assert [one["resps"] for one in got.samples[task]] == [one["resps"] for one in samples]
    assert got.results["n-samples"]["choose"]["effective"] == settings.get("limit", 9)
    assert got.results["n-shot"]["choose"] == settings.get("num_fewshot", 0)
    assert (len(tokenizer), tokenizer.pad_token) == (before, None)  # lm-eval gave its copy a padding token


def test_equals_the_float_model_with_the_same_weights(
    tasks: Callable[..., Tasks], quantised: tuple[Any, Any], source: Callable[..., Path]
) -> None:
    """The packed model against plain transformers with the dequantised weights: the scores are the codes', not the
    original's."""
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = quantised
    plain = dequantised(model)
    original = AutoModelForCausalLM.from_pretrained(source("llama"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(plain.get_parameter(name), original.get_parameter(name))
    got = zero_shot(model, tokenizer, tasks("choose"), name="tiny", batch_size=3)
    want = plainly(plain, tokenizer, tasks("choose"))
    assert got.results["results"] == want["results"]
    answers = [[one["resps"] for one in run["choose"]] for run in (got.samples, want["samples"])]
    torch.testing.assert_close(torch.tensor(answers[0], dtype=torch.float64)[..., 0],
                               torch.tensor(answers[1], dtype=torch.float64)[..., 0], rtol=1e-6, atol=0)  # fmt: skip


def test_scores_and_changes(
    tasks: Callable[..., Tasks], quantised: tuple[Any, Any], source: Callable[..., Path]
) -> None:
    model, tokenizer = quantised
    original, _ = quantkit.load(source("llama"))
    chosen = tasks("choose", "guess", "write")
    mine, its = (zero_shot(one, tokenizer, chosen, name="tiny", limit=6) for one in (model, original))
    scores = {(one.task, one.metric): one for one in mine.scores()}
    assert list(scores) == [
        ("choose", "acc"), ("choose", "acc_norm"), ("guess", "perplexity"), ("write", "exact_match"),
    ]  # fmt: skip
    acc = scores["choose", "acc"]
    assert (acc.value, acc.documents, acc.shots, acc.higher_is_better) == (
        mine.results["results"]["choose"]["acc,none"], 6, 0, True,
    )  # fmt: skip
    assert acc.stderr == mine.results["results"]["choose"]["acc_stderr,none"]
    changes = mine.changes(its)
    assert ("guess", "perplexity") not in changes  # no mean over documents
    for task, metric in (("choose", "acc"), ("choose", "acc_norm"), ("write", "exact_match")):
        change = changes[task, metric]
        both = [run.results["results"][task][f"{metric},none"] for run in (mine, its)]
        assert change.value == pytest.approx(both[0] - both[1], abs=1e-12)
        assert change.low <= change.value <= change.high


def test_results_are_saved_as_lm_eval_saves_them(
    tasks: Callable[..., Tasks], quantised: tuple[Any, Any], tmp_path: Path
) -> None:
    from lm_eval.utils import get_latest_filename, get_results_filenames, get_sample_results_filenames

    found = zero_shot(*quantised, tasks("choose"), name="org/tiny", limit=3, output_path=tmp_path, log_samples=True)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "org__tiny"
    files = [str(path) for path in folder.iterdir()]
    saved = json.loads(Path(get_latest_filename(get_results_filenames(files))).read_text())
    assert saved["results"] == found.results["results"]
    assert saved["config"]["model_args"] == {"pretrained": "org/tiny"}
    assert saved["model_name"] == "org/tiny"
    (samples,) = get_sample_results_filenames(files)
    assert [json.loads(line)["doc_id"] for line in Path(samples).read_text().splitlines()] == [0, 1, 2]


def test_progress_counts_every_request(tasks: Callable[..., Tasks], quantised: tuple[Any, Any]) -> None:
    seen: list[tuple[str, int, int]] = []
    zero_shot(*quantised, tasks("both", "roll"), name="tiny", limit=4, on_progress=lambda *event: seen.append(event))
    for what, total in (("questions", 12), ("texts", 4), ("generations", 4)):
        assert [event for event in seen if event[0] == what] == [(what, n, total) for n in range(1, total + 1)]


def test_nothing_is_printed(
    tasks: Callable[..., Tasks], quantised: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    zero_shot(*quantised, tasks("both", "roll"), name="tiny", limit=2, batch_size="auto")
    assert capsys.readouterr() == ("", "")


def test_what_pads_a_question_does_not_reach_its_answer(quantised: tuple[Any, Any]) -> None:
    """With a cache that packs tokens together; and each token reads what is held when it comes."""
    import torch

    model, tokenizer = quantised
    set_kv(model, kv_of("nsnquant", {"window": 16, "sink": 0, "min_recent": 0}), "dense")
    try:
        ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
        alone = language_model(model, tokenizer)._model_call(ids[:1, :24])
        ids[0, 24:] = 0
        batched = language_model(model, tokenizer)._model_call(ids)
        assert batched.shape[:2] == (2, 40)
        torch.testing.assert_close(batched[:1, :24], alone, rtol=1e-4, atol=1e-4)
        expected = torch.cat(list(streamed_logits(model, ids)), dim=1)
        assert torch.equal(batched, expected)
        one_pass = language_model(model, tokenizer, stream=False)._model_call(ids)
        assert torch.equal(one_pass, model(ids, use_cache=False).logits)
        assert (one_pass[:1, :24] - alone).abs().max() > 1e-3
    finally:
        set_kv(model, None)


def test_git_is_quiet_where_there_is_none(
    quantised: tuple[Any, Any], tasks: Callable[..., Tasks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = zero_shot(*quantised, tasks("guess"), name="tiny", limit=1)
    assert "git_hash" in found.results
    assert "git" not in capfd.readouterr().err


def test_the_cpu_guesses_no_batch_size(quantised: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = quantised
    monkeypatch.setattr(model, "forward", None)
    assert language_model(model, tokenizer)._detect_batch_size() == 8


def test_coarse_log_likelihoods_tie_and_float32_ones_do_not(
    tasks: Callable[..., Tasks], source: Callable[..., Path]
) -> None:
    model, tokenizer = quantkit.load(source("llama"), dtype="bfloat16")
    coarse = zero_shot(model, tokenizer, tasks("choose"), name="tiny")
    fine = zero_shot(model, tokenizer, tasks("choose"), name="tiny", softmax_dtype="float32")
    likelihoods = [[one["filtered_resps"] for one in run.samples["choose"]] for run in (coarse, fine)]
    best = [[sorted(answer[0] for answer in answers)[-2:] for answers in run] for run in likelihoods]
    assert coarse.ties() == sum(one == other for one, other in best[0])
    assert fine.ties() == 0
    assert any(answer[0] != round(answer[0] * 64) / 64 for answers in likelihoods[1] for answer in answers)
    assert fine.results["config"]["model_args"] == {"pretrained": "tiny", "softmax_dtype": "float32"}


@pytest.mark.parametrize(
    ("answers", "tied"),
    [
        ([(-1.5, False), (-1.5, True)], True),
        ([(-3.0, False), (-1.5, True), (-3.0, False)], False),  # two that are not the likeliest
        ([(-1.5, False)], False),
        (["a text", "a text"], False),
        ([-2.0, -2.0], False),
    ],
)
def test_what_a_tie_is(answers: list[Any], tied: bool) -> None:
    assert ZeroShot({}, {"task": [{"filtered_resps": answers}]}).ties() == tied


@pytest.mark.parametrize("limit", [0, -3, 2.5])
def test_limits_that_are_none(tasks: Callable[..., Tasks], quantised: tuple[Any, Any], limit: float) -> None:
    with pytest.raises(RecipeError, match="is neither a number of documents nor a share"):
        zero_shot(*quantised, tasks("choose"), name="tiny", limit=limit)


def test_examples_that_the_local_data_has_not(quantised: tuple[Any, Any], tasks: Callable[..., Tasks]) -> None:
    chosen = tasks("choose")
    without = Tasks(chosen.manager, chosen.chosen, {"choose": "train"})
    with pytest.raises(RecipeError, match="task 'choose' takes its 2 examples from split 'train', which --data"):
        zero_shot(*quantised, without, name="tiny", num_fewshot=2)
    assert zero_shot(*quantised, without, name="tiny", limit=1).scores()


def test_where_results_cannot_be_saved(tmp_path: Path, quantised: tuple[Any, Any], tasks: Callable[..., Tasks],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"--output-path .*file/results cannot be made"):
        check_output_path(tmp_path / "file" / "results")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(QuantkitError, match=r"lm-eval could not save its results in"):
        zero_shot(*quantised, tasks("choose"), name="tiny", limit=1, output_path=tmp_path / "results")
