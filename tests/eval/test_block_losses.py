"""A block that is changed loses by itself; those behind it only carry what it lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, make_tiny
from tiny_tokenizer import TEXT, VOCABULARY, make_tokenizer
from transformers import PreTrainedModel
from typer.testing import CliRunner

from quantkit.errors import QuantkitError
from quantkit.eval.block_losses import block_losses, main
from quantkit.models.skeleton import blocks_path

TOKENS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    original = make_tiny(TINY[name](vocab_size=VOCABULARY))
    other = make_tiny(type(original.config)(**original.config.to_dict()))
    other.load_state_dict(original.state_dict())
    return original, other


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "mixtral"])
def test_a_changed_block_is_found(name: str) -> None:
    original, other = pair(name)
    blocks = other.get_submodule(blocks_path(other))
    changed = len(blocks) - 2
    assert changed >= 0
    with torch.no_grad():
        for parameter in blocks[changed].parameters():
            parameter.mul_(1.05)
    found = block_losses(original, other, TOKENS)
    assert [loss > 1e-8 for loss in found["own"]] == [n == changed for n in range(len(blocks))]
    assert [loss > 1e-8 for loss in found["carried"]] == [n >= changed for n in range(len(blocks))]
    assert found["own"][changed] == pytest.approx(found["carried"][changed], rel=1e-3)


def test_the_loss_is_in_units_of_the_variance() -> None:
    """Of a block that puts out nothing but the mean, the error is the variance."""
    original, other = pair("llama")
    last = len(other.get_submodule(blocks_path(other))) - 1
    other.get_submodule(f"{blocks_path(other)}.{last}").register_forward_hook(
        lambda module, args, output: output[:, 1:].mean(dim=1, keepdim=True).expand_as(output)
    )
    found = block_losses(original, other, TOKENS)
    length = TOKENS.shape[1] - 1
    assert found["own"][last] == pytest.approx((length - 1) / length, rel=1e-4)  # which is unbiased


def test_another_residual_stream_is_refused() -> None:
    original, other = pair("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(QuantkitError, match="rotated"):
        block_losses(original, other, TOKENS)


def test_the_table(tmp_path: Path) -> None:
    import typer

    make_tiny(TINY["llama"](vocab_size=VOCABULARY)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} {TEXT}" for n in range(60)))
    app = typer.Typer()
    app.command()(main)
    flags = [
        f"--model={tmp_path / 'model'}",
        f"--calibration={tmp_path / 'text.txt'}",
        f"--text={tmp_path / 'text.txt'}",
    ]
    flags += ["--method=rtn W8A16", "--method=rtn W3A16", "--seqlen=32", f"--output={tmp_path / 'found.json'}"]
    done = CliRunner().invoke(app, flags, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    fine, coarse = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert fine["method"] == "rtn W8A16"
    for kind in ("own", "carried"):
        assert all(0 < one < other / 10 for one, other in zip(fine[kind], coarse[kind], strict=True))
    line = next(line for line in done.stdout.splitlines() if "rtn W3A16" in line and "carried" in line)
    mean = math.exp(sum(map(math.log, coarse["carried"])) / len(coarse["carried"]))
    assert f"{mean:.2g}" in line
