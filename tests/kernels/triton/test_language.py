"""What Triton's older releases do not compile is in no kernel: torch 2.11 comes with Triton 3.6."""

import ast
from pathlib import Path

import pytest

from quantkit.kernels.triton import compat

FILES = sorted(Path(compat.__file__).parent.glob("*_kernels.py"))


def compiled(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions that are decorated for Triton."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.decorator_list]


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_kernels_say_it_in_a_way_that_every_triton_takes(file):
    functions = compiled(ast.parse(file.read_text(encoding="utf-8")))
    assert functions
    for node in (node for function in functions for node in ast.walk(function)):
        where = f"{file.name}, line {getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.Compare) and len(node.ops) > 1), f"{where}: a < b < c"
        if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple):
            assert all(isinstance(part, ast.Name) for part in node.target.elts), f"{where}: nested targets of a loop"


def test_it_would_notice():
    (function,) = compiled(ast.parse("@jit\ndef f(x):\n    for a, (b, c) in x:\n        return 0 < a < b\n"))
    assert sum(isinstance(node, ast.Compare) and len(node.ops) > 1 for node in ast.walk(function)) == 1
    assert any(isinstance(node, ast.For) and isinstance(node.target.elts[1], ast.Tuple) for node in ast.walk(function))


def test_no_launcher_waits_for_the_device():
    """A graph can be captured of a call only if nothing in it asks for a number of a tensor."""
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
    launchers = sorted(Path(compat.__file__).parent.glob("*.py"))
    assert len(launchers) > len(FILES)
    for file in launchers:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr
            assert called not in waits, f"{file.name}, line {getattr(node, 'lineno', 0)}: .{called}()"
