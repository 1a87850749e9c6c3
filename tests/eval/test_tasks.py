"""Tasks are lm-eval's, found without reading all of them; their documents come from a folder if it has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="tasks are lm-eval's: pip install 'quantkit[eval]'")

from quantkit.errors import QuantkitError, RecipeError
from quantkit.eval import tasks as module
from quantkit.eval.tasks import _Library, leaves, load_tasks, single_tasks

pytestmark = pytest.mark.slow  # importing lm-eval takes many seconds

PAIRS = [{"sentence_good": f"The {n} dogs run.", "sentence_bad": f"The {n} dogs runs."} for n in range(6)]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """Once for all tests here: the import, and the text of all definitions."""
    import lm_eval.models.huggingface  # noqa: F401


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of definitions with few folders in it, for tests that look for names."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    texts = {}
    for folder in ("blimp", "arc", "hellaswag", "glue"):
        files = (path for path in (root / folder).rglob("*") if path.suffix in ("", ".yaml") and path.is_file())
        texts[root / folder] = [path.read_text(encoding="utf-8") for path in files]
    monkeypatch.setattr(_Library, "_texts", texts)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two sets of BLiMP with six pairs each, in a folder."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("wh_island", "adjunct_island"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No data set can be fetched; returns the names of those that someone tried to fetch."""
    import datasets

    tried: list[str] = []
    load = datasets.load_dataset

    def refuse(path: str, *args: Any, **options: Any) -> Any:
        if path in ("json", "parquet"):
            return load(path, *args, **options)
        tried.append(path)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    return tried


@pytest.mark.usefixtures("library")
def test_documents_come_from_the_folder_and_all_else_from_lm_eval(pairs: Path, offline: list[str]) -> None:
    found = load_tasks(["blimp_wh_island", "blimp_adj*"], data=pairs)
    assert [task.task_name for task in found.chosen] == ["blimp_wh_island", "blimp_adjunct_island"]
    assert offline == []
    task = found.chosen[0]
    assert [dict(doc) for doc in task.validation_docs()] == PAIRS
    assert task.config.output_type == "multiple_choice"
    assert task.doc_to_choice(PAIRS[0]) == ["The 0 dogs run.", "The 0 dogs runs."]
    assert (task.VERSION, task.config.num_fewshot) == (1.0, 0)


@pytest.mark.usefixtures("library")
def test_a_folder_of_splits_and_a_parquet_file(tmp_path: Path, offline: list[str]) -> None:
    import datasets

    folder = tmp_path / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    question = {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(question | {"id": split}) + "\n")
    datasets.Dataset.from_list([question | {"id": "one"}]).to_parquet(tmp_path / "ARC-Challenge.parquet")
    found = load_tasks(["arc_easy", "arc_challenge"], data=tmp_path)
    easy, challenge = found.chosen
    assert [easy.test_docs()[0]["id"], easy.training_docs()[0]["id"]] == ["test", "train"]
    assert [doc["id"] for doc in challenge.test_docs()] == ["one"]
    assert found.no_examples == {"arc_challenge": "train"}
    assert offline == []


@pytest.mark.usefixtures("library")
def test_a_missing_data_set_says_where_it_would_be(pairs: Path, offline: list[str]) -> None:
    with pytest.raises(QuantkitError) as raised:
        load_tasks(["blimp"], data=pairs)  # has two of its 67 sets: no average over these is called blimp
    assert raised.value.exit_code == 1
    assert offline == ["nyu-mll/blimp"]
    assert str(raised.value) == (
        "the data set of task 'blimp_anaphor_gender_agreement', nyu-mll/blimp, is neither in the local cache nor can "
        "it be fetched (Couldn't reach 'nyu-mll/blimp' on the Hub); without a network put it into a folder as "
        "anaphor_gender_agreement.jsonl, or anaphor_gender_agreement/train.jsonl beside the other splits, and name "
        "that folder with --data."
    )


@pytest.mark.usefixtures("library", "offline")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["hellaswagg"], r"unknown task 'hellaswagg'\. Did you mean 'hellaswag'"),
        (["blimp_adjunct_island", "blimp_wh_iland"], r"unknown task 'blimp_wh_iland'\. Did you mean 'blimp_wh_island'"),
        (["zzz_*"], r"unknown task 'zzz_\*'\. All are listed by `lm-eval ls tasks`"),
        (["hellaswag"], r"has no data set for task 'hellaswag'; it would be hellaswag\.jsonl, or hellaswag/validation"),
        (["blimp_adj*", "blimp_adjunct_island"], None),
    ],
)
def test_names_that_cannot_be(pairs: Path, names: list[str], message: str | None) -> None:
    if message is None:  # a pattern and a name in it are one task
        assert len(load_tasks(names, data=pairs).chosen) == 1
        return
    with pytest.raises(RecipeError, match=message):
        load_tasks(names, data=pairs)


@pytest.mark.usefixtures("library")
def test_definitions_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    definition = {
        "task": "own_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own.yaml").write_text(json.dumps(definition))
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "own", "task": ["own_pairs"]}))
    (group,) = load_tasks(["own"], include_path=tmp_path).chosen
    assert [task.task_name for task in single_tasks([group])] == ["own_pairs"]
    with pytest.raises(RecipeError, match="task 'own_pairs' was asked for twice"):
        load_tasks(["own", "own_pairs"], include_path=tmp_path)
    with pytest.raises(RecipeError, match=r"--include-path .*/nowhere is no folder"):
        load_tasks(["own"], include_path=tmp_path / "nowhere")


@pytest.mark.usefixtures("library")
def test_data_sets_may_be_where_definitions_are(pairs: Path, offline: list[str]) -> None:
    (task,) = load_tasks(["blimp_wh_island"], include_path=pairs).chosen
    assert [dict(doc) for doc in task.validation_docs()] == PAIRS
    assert offline == []
    with pytest.raises(QuantkitError, match=r"'hellaswag', Rowan/hellaswag, is neither in the local cache"):
        load_tasks(["hellaswag"], include_path=pairs)


@pytest.mark.usefixtures("library")
def test_a_group_finds_its_tasks_in_other_folders(tmp_path: Path, pairs: Path, offline: list[str]) -> None:
    """Only folders that name what is wanted are parsed; those of a group's members are, too."""
    members = ["blimp_wh_island", {"group": "inner", "task": [{"task": "blimp_adjunct_island", "num_fewshot": 0}]}]
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "mixed", "task": members}))
    found = load_tasks(["mixed"], include_path=tmp_path, data=pairs)
    assert [task.task_name for task in single_tasks(found.chosen)] == ["blimp_wh_island", "blimp_adjunct_island"]
    assert "hellaswag" not in found.manager.task_index
    assert offline == []


def test_every_well_known_task_is_found_where_lm_eval_has_it() -> None:
    """On the real library: the folders that are parsed hold the task, and are few."""
    library = _Library()
    for name in ("arc_easy", "hellaswag", "lambada_openai", "piqa", "winogrande", "boolq", "mmlu", "gsm8k", "blimp"):
        folders = library.folders([name])
        assert 1 <= len(folders) < 10
        assert any(name in path.read_text() for folder in folders for path in folder.rglob("*.yaml"))
    assert {"arc_easy", "mmlu_anatomy", "blimp"} <= library.names()


def test_leaves_of_tags_and_unknown_names() -> None:
    class Entry:
        def __init__(self, kind: str, cfg: Any = None, tags: Any = ()) -> None:
            self.kind, self.cfg, self.tags = type("Kind", (), {"name": kind}), cfg, set(tags)

    index = {"tag": Entry("TAG", tags=["b", "a"]), "a": Entry("TASK"), "group": Entry("GROUP", {"task": ["tag", "c"]})}
    assert list(leaves(index, "group")) == ["a", "b", "c"]
    assert list(leaves(index, {"group": "new", "task": ["a", {"task": "tag"}]})) == ["a", "a", "b"]


def test_lm_eval_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(QuantkitError, match=r"not installed; `pip install 'quantkit\[eval\]'`"):
        load_tasks(["blimp"])


def test_libraries_are_quiet_inside_and_not_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from tqdm import tqdm

    with module.quiet_lm_eval():
        print("a hint")
        logging.getLogger("lm_eval.tasks").warning("a warning")
        list(tqdm(range(3), disable=False))
    assert capsys.readouterr() == ("", "")
    list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err
