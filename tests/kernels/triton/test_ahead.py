"""The table of what was compiled ahead of time, and its verdict."""

from __future__ import annotations

from collections import Counter

import pytest

from quantkit.kernels.triton import ahead, configs


def line(spilled: int = 0, shared: int = 1024, meant: bool = True) -> ahead.Line:
    built = ahead.Built(64, spilled, shared, Counter(ADD=7), Counter())
    return ahead.Line("sm_90", "a kernel", built, {"warps": "4", "per weight": "1.25"}, meant)


def test_lines_stand_under_their_heads(capsys):
    assert ahead.print_lines([line(), line()]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["target", "variant", "warps", "per", "weight", "regs", "spilled", "shared"]
    assert len(lines) == 2
    for name, value in {"warps": "4", "per weight": "1.25", "regs": "64", "shared": "1024"}.items():
        end = head.index(name) + len(name)
        assert lines[0][:end].endswith(f" {value}"), name


@pytest.mark.parametrize(
    "bad", [line(spilled=8), line(shared=configs.SHARED_LIMIT["sm_90"] + 1), line(meant=False)], ids=str
)
def test_what_does_not_fit_is_said(capsys, bad):
    assert ahead.print_lines([line(), bad, line()]) == 1
    assert [text.endswith("DOES NOT FIT") for text in capsys.readouterr().out.splitlines()[1:]] == [False, True, False]
    assert ahead.print_lines([]) == 0
