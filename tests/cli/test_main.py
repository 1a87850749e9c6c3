"""What every command owes its user: an answer at once, an example, one line per error, the right exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import Commands, app
from quantkit.errors import QuantkitError, RecipeError

COMMANDS = ["quantize", "eval", "compare", "generate", "inspect", "methods"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["eval", "--help"], ["methods"]])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"}
    done = run_python(
        "import sys\n"
        f"sys.argv = {['quantkit', *arguments]!r}\n"
        "from quantkit.cli.main import main\n"
        "try:\n    main()\n"
        f"finally:\n    print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    assert done.returncode == 0
    assert done.stderr == "[]\n"


def test_help_lists_every_command() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert f"quantkit {command} " in done.stdout.split("Examples:")[1] + " "


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"quantkit {quantkit.__version__}\n"


@pytest.mark.parametrize("arguments", [["quantise"], ["eval", "demo"], ["eval"], ["methods", "--yaml"]])
def test_bad_usage_is_status_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def failing(error: BaseException) -> typer.Typer:
    """An application as in main.py whose one command ends in ``error``."""
    application = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @application.command("fail")
    def fail() -> None:
        raise error

    @application.command("other")
    def other() -> None:
        """Two commands, so that typer makes a group."""

    return application


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (QuantkitError("shard x is cut off"), 1, "quantkit: shard x is cut off\n"),
        (RecipeError("unknown method 'smq'"), 2, "quantkit: unknown method 'smq'\n"),
        (KeyboardInterrupt(), 130, "quantkit: interrupted\n"),
    ],
)
def test_the_users_errors_are_one_line(error: BaseException, status: int, line: str) -> None:
    done = CliRunner().invoke(failing(error), ["fail"])
    assert (done.exit_code, done.stderr, done.stdout) == (status, line, "")


def test_a_bug_keeps_its_traceback() -> None:
    done = run_python(
        "import quantkit.cli.methods as methods\n"
        "import quantkit.cli.main as main\n"
        "methods.METHODS['broken'] = None\n"
        "main.app(['methods'])\n"
    )
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "AttributeError: 'NoneType' object has no attribute 'name'" in done.stderr
