"""The page: it holds the figures of the record, lets nothing in and nothing out, and opens for a run that died."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
import torch
from run_records import Page, block, end, start, write_record

from quantkit.eval.activations import Activation
from quantkit.eval.report import figures
from quantkit.eval.report.drawing import picture
from quantkit.eval.report.flatness import Looked
from quantkit.eval.report.measured import Figure, Measured
from quantkit.eval.report.page import activations_page, run_page
from quantkit.eval.report.record import Learning, load_record

EVIL = "<script>alert('$x_$')</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_page(load_record(write_record(tmp_path_factory.mktemp("out"))))


def test_it_holds_the_figures_of_the_record(finished: str) -> None:
    page = Page(finished)
    assert "some/model, quantised: flatquant + gptq, W4A4GC" in page.text
    for figure in ("4.250", "7.0 MB to 2.5 MB", "64.2 s", "621.0 MB", "1e-06", "look at block 1", "a note"):
        assert figure in page.text
    assert "method: flatquant" in page.text  # the recipe
    assert ["model.layers.1.mlp.up_proj", "12.62 %", "4.250", "0.25", "W4SA4GC", "40 x 64", "1.4 kB"] in page.rows
    assert ["1", "12.62 %", "13.5 s", "615.0 MB"] in page.rows
    labels = page.attributes("aria-label")
    for title in ("Loss per block before and after flatquant", "Learning curve of flatquant in block 1"):
        assert title in labels


def test_worst_layers_come_first(finished: str) -> None:
    names = Page(finished).column("layer")
    kinds = ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"]
    assert names == [f"model.layers.{index}.{kind}" for kind in kinds for index in (1, 0)]


def test_cells_are_sorted_by_numbers_and_headings_are_buttons(finished: str) -> None:
    page = Page(finished)
    errors = [float(value) for value in re.findall(r'data-value="([^"]+)">[\d.]+ %<', finished)]
    assert max(errors) == pytest.approx(151.5)
    assert ("button", {"type": "button"}) in page.elements
    assert page.attributes("aria-sort").count("descending") == 1


def test_nothing_is_loaded_from_anywhere(finished: str) -> None:
    page = Page(finished)
    assert all(target.startswith(("#", "data:")) for target in page.attributes("href", "src", "xlink:href"))
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?://|@import|url\((?!#)", finished)
    (policy,) = page.attributes("content")[:1]
    assert policy.startswith("default-src 'none'")


def test_only_our_script_may_run(finished: str) -> None:
    (script,) = Page(finished).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in Page(finished).attributes("content")[0]


def test_every_reference_inside_has_its_target_once(finished: str) -> None:
    page = Page(finished)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.attributes("href")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", finished)) <= set(ids)


def test_names_of_others_are_only_text(tmp_path: Path) -> None:
    events = [
        start(model=EVIL, notes=[EVIL], loads_in=EVIL, versions={EVIL: EVIL}, scheme=EVIL, residual=EVIL),
        block(0, {EVIL: 0.1, "a\ud800$": 0.2}, kept=[EVIL]),
        block(1, transforms=[{"method": EVIL, "site": EVIL, "loss_before": 2.0, "loss": 1.0, "accepted": False}]),
        end(warnings=[EVIL]),
    ]
    measured = Measured({("", "", ""): Figure(EVIL, EVIL, EVIL, "lower", 1.0, 2.0)}, notes=[EVIL])
    measured.models["before"] = [EVIL]
    activation = Activation(EVIL, torch.ones(4), torch.ones(3, 4), 3, 1.0, 1.0, None, None)
    looked = Looked({EVIL: activation}, None, EVIL)
    html = run_page(
        load_record(write_record(tmp_path / EVIL.replace("/", "|"), *events)), measured=measured, looked=looked
    )
    html.encode("utf-8")
    page = Page(html)
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert page.text.count(EVIL) > 12
    assert EVIL not in html


def test_a_run_that_stopped(tmp_path: Path) -> None:
    record = load_record(write_record(tmp_path / "out.partial", start(), block(0), cut='{"event": "sh'))
    page = Page(run_page(record))
    assert "This run has not come to its end: 1 of 2 blocks are done." in page.text
    assert re.search(r"quantkit quantize some/model --recipe recipe.yaml -o \S*/out --resume", page.text)
    assert len(page.column("layer")) == 3
    assert "None so far" in page.text


def test_a_run_that_stopped_at_once(tmp_path: Path) -> None:
    page = Page(run_page(load_record(write_record(tmp_path, start()))))
    assert "0 of 2 blocks are done" in page.text
    assert "method: flatquant" in page.text


def test_a_finished_run_says_nothing_of_the_kind(finished: str) -> None:
    assert "not come to its end" not in finished
    assert "--resume" not in finished


def test_the_same_record_gives_the_same_bytes(finished: str, tmp_path: Path) -> None:
    again = run_page(load_record(write_record(tmp_path / "out")))
    (name,) = re.findall(r"Report of the run in ([^<]*)<", finished)
    assert again == finished.replace(name, "out")


def test_what_was_measured_before_and_after(tmp_path: Path) -> None:
    figure = Figure("novels", "perplexity", "80 tokens", "lower", 10.0, 10.5, (0.04, 0.06), relative=True)
    better = Figure("arc", "acc", "8 documents", "higher", 0.5, 0.75)
    measured = Measured({("a", "", ""): figure, ("b", "", ""): better})
    html = run_page(load_record(write_record(tmp_path)), measured=measured)
    rows = Page(html).rows
    assert ["novels: perplexity", "10", "10.5", "+5.00 %", "+4.00 % .. +6.00 %", "80 tokens"] in rows
    assert ["arc: acc", "0.5", "0.75", "+0.25", "", "8 documents"] in rows
    assert 'class="number worse">+5.00 %<' in html
    assert 'class="number better">+0.25<' in html


def test_activations_of_two_models() -> None:
    before = Activation("q", torch.tensor([1.0, 30.0]), torch.ones(3, 2), 3, 2.0, 1.4, None, 0.5)
    after = Activation("q", torch.tensor([2.0, 3.0]), torch.ones(3, 2), 3, 2.0, 1.1, None, None)
    page = Page(activations_page("some/model", Looked({"q": after}, {"q": before}, "3 tokens of 'x'")))
    assert ["q", "15.0", "1.5", "1.40", "1.10", "2"] in page.rows
    assert sum(tag == "svg" for tag, _ in page.elements) == 3
    one = Page(activations_page("some/model", Looked({"q": after}, None, "3 tokens of 'x'")))
    assert ["q", "1.5", "1.10", "2"] in one.rows
    assert sum(tag == "svg" for tag, _ in one.elements) == 2


def test_the_curve_is_the_sorted_channels() -> None:
    svg = figures.channel_curves("t", {"after": torch.tensor([1.0, 4.0, 2.0])})
    lines = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", line) for line in re.findall(r'd="([^"]*)"[^>]*var\(--c2\)', svg)]
    heights = [float(y) for _, y in max(lines, key=len)]
    assert len(heights) == 3
    assert (heights[1] - heights[0]) / (heights[2] - heights[1]) == pytest.approx(2, rel=1e-3)  # 4, 2, 1; y grows down


def test_no_channel_is_lost_in_a_heat_map() -> None:
    values = torch.zeros(2, 10)
    values[0, 9], values[1, 3] = 5.0, 7.0
    pooled = figures.pooled(values, 4)
    assert pooled.tolist() == [[0, 0, 0, 5], [0, 7, 0, 0]]


def test_pictures_take_their_colours_from_the_page() -> None:
    svg = figures.learning_of_block("t", Learning((0.5, None), (0.9, 0.4, None), 1))
    assert "currentColor" in svg
    assert "var(--c1)" in svg
    assert "var(--rule)" in svg
    assert not re.search(r"#(?!\w*\")[0-9a-f]{6}", svg)  # no colour of its own
    assert "font-family" not in svg


def test_logarithmic_axes_have_numbers_not_formulas() -> None:
    svg = figures.histogram("t", torch.linspace(-1, 1, 4), torch.tensor([0.0001, 0.9998, 0.0001]))
    assert re.findall(r">([^<]*)</text>", svg).count("100") == 1
    assert "math" not in svg


def test_a_users_matplotlib_settings_do_not_matter() -> None:
    import matplotlib

    def draw(_: object, axes: object) -> None:
        axes.plot([1, 2])  # type: ignore[attr-defined]

    plain = picture("t", draw)
    with matplotlib.rc_context({"lines.linewidth": 9, "text.color": "red", "axes.facecolor": "red"}):
        assert picture("t", draw) == plain
