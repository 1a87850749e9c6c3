"""``quantkit quantize`` and ``quantkit inspect`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_records import Page
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.models.checkpoint import Checkpoint


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_dry_run_plans_and_writes_nothing(tiny, tmp_path):
    flags = ("--scheme", "W4A16GC", "--ignore", "*.w2", "-o", tmp_path / "out")
    text = run("quantize", tiny("mixtral"), "--dry-run", *flags)
    assert "scheme:" in text
    assert "steps:" in text
    assert "model.layers.0.mlp.experts.0.w1" in text
    line = next(line for line in text.splitlines() if line.startswith("model.layers.1.mlp.experts.2.w2"))
    assert "full precision" in line
    assert "ignored" in line
    assert "loads in:" in text
    assert "peak memory about" in text
    assert not list(tmp_path.iterdir())


def test_the_plan_says_exactly_how_large_the_output_will_be(tiny, tmp_path):
    for name, scheme in (("llama", "W3A16G32"), ("qwen2_moe", "W4A16G32"), ("opt", "W8A8"), ("gpt_neox", "WNF4A16G64")):
        plan = json.loads(run("quantize", tiny(name), "--dry-run", "--json", "--scheme", scheme))
        out = tmp_path / f"{name}-{scheme}"
        result = json.loads(run("quantize", tiny(name), "--json", "--scheme", scheme, "-o", out))
        assert plan["output_bytes"] == result["output_bytes"] == Checkpoint.open(out).nbytes
        assert plan["format"] == result["format"]


def test_inspect_agrees_with_the_files(tiny, tmp_path):
    for name in ("llama", "mixtral"):
        out = tmp_path / name
        result = json.loads(run("quantize", tiny(name), "--json", "--scheme", "W4A16G32", "-o", out))
        report = json.loads(run("inspect", out, "--json", "--sort", "error"))
        assert len(report["layers"]) == result["layers"]
        assert report["bits_per_weight"] == pytest.approx(result["bits_per_weight"])
        errors = [layer["error"] for layer in report["layers"]]
        assert errors == sorted(errors, reverse=True)
        assert 0.02 < errors[-1] < errors[0] < 0.3
        assert report["bytes"] == Checkpoint.open(out).nbytes
        table = run("inspect", out)
        assert f"{result['layers']} quantised linears" in table
        assert "W4SA16G32" in table


def test_inspect_of_a_portable_checkpoint_counts_no_embedding(tiny, tmp_path):
    """compressed-tensors formats hold for "every Linear" by default, and an embedding's weight looks like one."""
    result = json.loads(run("quantize", tiny("llama"), "--json", "--scheme", "W8A8", "-o", tmp_path / "out"))
    report = json.loads(run("inspect", tmp_path / "out", "--json"))
    assert report["quant_method"] == "compressed-tensors"
    assert len(report["layers"]) == result["layers"]
    assert report["bits_per_weight"] == pytest.approx(result["bits_per_weight"])


def test_the_saved_recipe_repeats_the_run(tiny, tmp_path):
    flags = ("--method", "sinq", "--scheme", "W3A16G32", "--ignore", "*.k_proj")
    run("quantize", tiny("llama"), *flags, "-o", tmp_path / "a")
    run("quantize", tiny("llama"), "--recipe", tmp_path / "a" / "quantkit-recipe.yaml", "-o", tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_inspect_of_a_float_model_says_what_to_do(tiny):
    result = CliRunner().invoke(app, ["inspect", str(Path(tiny("llama")))])
    assert result.exit_code == 1
    assert "not quantised" in result.stderr


def test_the_checkpoint_carries_the_cache_that_was_asked_for(tiny, tmp_path):
    flags = ("quantize", tiny("llama"), "--method", "rtn", "--scheme", "W4A16G32")
    run(*flags, "--kv", "nsnquant-2bit", "-o", tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache"]
    assert (stored["method"], stored["bits"]) == ("nsnquant", 2)
    assert json.loads(run(*flags, "--kv", "kivi-2bit", "--dry-run", "--json"))["kv_cache"]["method"] == "kivi"

    recipe = tmp_path / "out" / "quantkit-recipe.yaml"  # a flag overrides what the recipe says
    for name, method in (("kivi-4bit", "kivi"), ("none", None)):
        plan = json.loads(run("quantize", tiny("llama"), "--recipe", recipe, "--kv", name, "--dry-run", "--json"))
        assert (plan["kv_cache"] or {}).get("method") == method


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kv", "nsnqant-2bit"), "kv is no cache: unknown"),
        (("--scheme", "W4A16KV4", "--kv", "kivi-2bit"), "leave one of them out"),
        (("--scheme", "W4A16KV4", "--kv", "none"), "leave KV4 out of the scheme, or --kv."),
        (("--report", "no/such/page.html"), "name a file in a folder that is there, or in OUT"),
        (("--report", "OUT"), "name a file in a folder that is there, or in OUT"),
        (("--report", "page.html", "--dry-run"), "is about a run, and --dry-run makes none"),
    ],
)
def test_refusals_come_before_the_run(tiny, tmp_path, flags, message):
    flags = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
    done = CliRunner().invoke(app, ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), *flags])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_of_the_run_is_written_with_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.cli.report.HISTOGRAMS", 0)  # drawing takes longer than all else here
    flags = ("quantize", tiny("llama"), "--method", "rtn", "--scheme", "W4A16G32")
    inside = tmp_path / "a" / "report.html"
    assert run(*flags, "-o", tmp_path / "a", "--report", inside).endswith(f"the report is {inside}\n")
    page = inside.read_text()
    inside.unlink()
    run("report", tmp_path / "a")
    assert inside.read_text() == page
    assert "model.layers.1.mlp.down_proj" in Page(page).column("layer")
    printed = run(*flags, "-o", tmp_path / "b", "--report", tmp_path / "b.html", "--json")
    assert json.loads(printed)["output"] == str(tmp_path / "b")
    assert (tmp_path / "b.html").exists()


def test_the_column_of_the_calibration_text_is_chosen(source, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"body": "' + "one two three " * 200 + '"}\n')
    flags = [str(source("llama")), "--method", "gptq", "--scheme", "W4A16G32", "--calibration", str(text)]
    flags += ["--nsamples", "2", "--seqlen", "8", "-o", str(tmp_path / "out")]
    with pytest.raises(AssertionError, match=r"no column 'text'; its columns: body\. Choose one with --column\."):
        run("quantize", *flags)
    assert "reload checked" in run("quantize", *flags, "--column", "body")
