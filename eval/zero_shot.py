"""Scores on lm-eval's tasks: its tasks, its requests, its scoring and its results; the model is one of ours.

A model goes into lm-eval as the object it is, so a quantised one is asked as it runs: packed, with its kernels and its
quantised cache. Nothing about a request or a score is changed here, so a number is the one that lm-eval gives. That
includes its log-likelihoods in the model's dtype: in bfloat16, where numbers around 60 are 1/4 apart, different answers
get the same one, and the first of them counts as chosen. In BLiMP, for one, the first is the right one. ``ties`` says
how often that was; ``softmax_dtype``, an option of lm-eval's own wrapper, avoids it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval.paired import Difference, mean_difference
from quantkit.eval.streaming import one_call, streamed_logits
from quantkit.eval.tasks import Tasks, quiet_lm_eval, single_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.pipeline import OnProgress

AUTO = "auto"
CPU_BATCH_SIZE = 8
"""For ``auto`` where no memory runs out: lm-eval would run its largest batch five times and take that."""


@dataclass(frozen=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str
    """With the filter it was taken behind, where that is not ``none``: ``exact_match,strict-match``."""
    value: float
    stderr: float | None
    documents: int
    """Asked about; 0 for a group."""
    shots: int | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class ZeroShot:
    """What lm-eval found."""

    results: dict[str, Any]
    """As lm-eval returns and saves it (``lm_eval.result_schema.EvalResults``), without the samples."""
    samples: dict[str, list[dict[str, Any]]]
    """Task -> every document with the model's answers and its own metrics."""

    def ties(self) -> int:
        """Questions with several likeliest answers."""
        return sum(_is_tied(sample["filtered_resps"]) for samples in self.samples.values() for sample in samples)

    def scores(self) -> list[Score]:
        """Every number, groups in front of their tasks, in lm-eval's order."""
        return [score for task, numbers in self.results["results"].items() for score in self._of(task, numbers)]

    def _of(self, task: str, numbers: Mapping[str, Any]) -> list[Score]:
        scores = []
        for key, value in numbers.items():
            metric, comma, behind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = numbers.get(f"{metric}_stderr,{behind}")
            scores.append(
                Score(
                    task,
                    metric if behind == "none" else key,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    self.results.get("n-samples", {}).get(task, {}).get("effective", 0),
                    self.results.get("n-shot", {}).get(task),
                    self.results.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
        return scores

    def changes(self, baseline: ZeroShot) -> dict[tuple[str, str], Difference]:
        """(task, metric) -> by how much it differs from ``baseline`` on the same documents, with an interval.

        Only for metrics that are a mean over documents, which a perplexity for example is not.
        """
        found = {}
        for score in self.scores():
            metric, _, behind = score.metric.partition(",")
            mine, its = (_of_documents(run.samples.get(score.task, ()), metric, behind) for run in (self, baseline))
            if mine and len(mine) == len(its) and math.isclose(sum(mine) / len(mine), score.value, abs_tol=1e-9):
                found[score.task, score.metric] = mean_difference(torch.tensor(mine), torch.tensor(its))
        return found


def _is_tied(answers: Sequence[Any]) -> bool:
    """Answers to a question of choice are pairs: log-likelihood, and whether greedy decoding gives this one."""
    if len(answers) < 2 or not all(isinstance(answer, list | tuple) and len(answer) == 2 for answer in answers):
        return False
    likeliest, next_one = sorted((float(answer[0]) for answer in answers), reverse=True)[:2]
    return likeliest == next_one


def _of_documents(samples: Sequence[Mapping[str, Any]], metric: str, behind: str) -> list[float]:
    values = [sample.get(metric) for sample in samples if sample["filter"] == (behind or "none")]
    return [float(value) for value in values if isinstance(value, int | float)]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    *,
    name: str,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = AUTO,
    output_path: Path | None = None,
    log_samples: bool = False,
    softmax_dtype: str | None = None,
    stream: bool = True,
    on_progress: OnProgress | None = None,
) -> ZeroShot:
    """Ask ``model`` about ``tasks``.

    Args:
        model: as it is to be measured: what it does with its cache is part of it.
        name: of the model in the results.
        num_fewshot: examples in front of each question; None: as the task has it. Tasks that fix 0 keep it.
        limit: documents per task, or the share of them below 1; None: all.
        batch_size: requests per forward pass, or ``auto``: the largest that fits a GPU, on a CPU 8.
        output_path: folder, or name of a .json file, where lm-eval's tracker saves the results.
        log_samples: save every document with its answers beside them.
        softmax_dtype: of log-likelihoods; None: that of the logits.
        stream: as for ``quantkit.eval.perplexity.window_losses``. In one pass a cache that encodes several tokens
            together also encodes what pads a question to the longest of its batch, so answers depend on the batch.
        on_progress: called with (what, requests answered, requests in all).

    Raises:
        RecipeError: a limit that is none, examples that a local data set does not have.
        QuantkitError: the results could not be saved.
    """
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise RecipeError(f"--limit {limit:g} is neither a number of documents nor a share between 0 and 1.")
    _check_examples(tasks, num_fewshot)
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    with quiet_lm_eval(), _quiet_git():
        tracker = EvaluationTracker(output_path=str(output_path)) if output_path else None
        results = simple_evaluate(
            model=language_model(model, tokenizer, batch_size, softmax_dtype, stream, on_progress),
            model_args={"pretrained": name} | ({"softmax_dtype": softmax_dtype} if softmax_dtype else {}),
            tasks=list(tasks.chosen),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            device=str(model.device),
            limit=limit,
            evaluation_tracker=tracker,
            log_samples=True,
        )
        samples = results.pop("samples")
        if tracker and output_path:
            _save(tracker, output_path, results, samples, log_samples)
    return ZeroShot(results, samples)


def language_model(
    model: PreTrainedModel, tokenizer: Any, batch_size: int | str = AUTO, softmax_dtype: str | None = None,
    stream: bool = True, on_progress: OnProgress | None = None,
) -> Any:  # fmt: skip
    """``model`` as lm-eval wants it: its own wrapper of transformers' models.

    The class is made here because lm-eval need not be installed, and takes seconds to import.
    """
    from lm_eval.models.huggingface import HFLM

    class QuantkitLM(HFLM):
        """lm-eval's wrapper, which reports progress, reads a quantised cache as a text that is written does, and
        wastes no time on guessing a CPU's batch size."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.set_cache_hook(_Answered("questions", len(requests), on_progress))
            return super().loglikelihood(requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.set_cache_hook(_Answered("texts", len(requests), on_progress))
            return super().loglikelihood_rolling(requests, disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.set_cache_hook(_Answered("generations", len(requests), on_progress))
            return super().generate_until(requests, disable_tqdm)

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if not stream or attn_mask is not None or one_call(self.model, inps.shape[1]):
                return super()._model_call(inps, attn_mask=attn_mask, labels=labels)
            with torch.no_grad():
                return torch.cat(list(streamed_logits(self.model, inps)), dim=1)

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            if self.device.type == "cpu":
                return CPU_BATCH_SIZE
            return int(super()._detect_batch_size(requests, pos))

    # A copy, because lm-eval gives a tokenizer without a padding token one.
    own = copy.deepcopy(tokenizer)
    return QuantkitLM(pretrained=model, tokenizer=own, batch_size=batch_size, softmax_dtype=softmax_dtype)


@contextlib.contextmanager
def _quiet_git() -> Iterator[None]:
    """lm-eval writes down the commit of the current folder; where there is none, git would complain on stderr."""
    from lm_eval import evaluator

    ask = evaluator.get_git_commit_hash

    def quietly() -> str | None:
        kept = os.dup(2)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
                commit: str | None = ask()
                return commit
        finally:
            os.dup2(kept, 2)
            os.close(kept)

    evaluator.get_git_commit_hash = quietly
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


class _Answered:
    """Stands where lm-eval has its cache of answers, which is told of each one as it is there."""

    def __init__(self, what: str, total: int, on_progress: OnProgress | None) -> None:
        self._what, self._total, self._on_progress = what, total, on_progress
        self._done = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self._done += 1
        if self._on_progress:
            self._on_progress(self._what, self._done, self._total)


def _check_examples(tasks: Tasks, num_fewshot: int | None) -> None:
    """A local file holds one split, and lm-eval would take the examples from the questions then."""
    for task in single_tasks(tasks.chosen):
        split = tasks.no_examples.get(task.task_name)
        own = task.get_config("num_fewshot")
        count = own if own == 0 or num_fewshot is None else num_fewshot
        if split and count:
            raise RecipeError(
                f"task '{task.task_name}' takes its {count} examples from split '{split}', which --data does not have; "
                "make its data set a folder with a file per split, or use --num-fewshot 0."
            )


def check_output_path(path: Path) -> None:
    """Called before hours of work.

    Raises:
        RecipeError: results cannot be saved there.
    """
    folder = path.parent if path.suffix == ".json" else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output-path {path} cannot be made: {error.strerror or error}.") from None
    if not os.access(folder, os.W_OK):
        raise RecipeError(f"--output-path {path}: {folder} cannot be written to; choose another folder.")


def _save(tracker: Any, path: Path, results: dict[str, Any], samples: dict[str, Any], log_samples: bool) -> None:
    """The tracker only logs what goes wrong, so look whether the file is there."""
    tracker.save_results_aggregated(results=results, samples=samples)
    written = f"*{getattr(tracker, 'date_id', ' ')}.json"
    if not any((path.parent if path.suffix == ".json" else path).rglob(written)):
        raise QuantkitError(f"lm-eval could not save its results in {path}; is the disk full?")
    if log_samples:
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
