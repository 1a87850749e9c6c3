"""The ``quantkit`` command: the list of its commands, and what becomes of their errors.

``quantkit --help`` must answer at once: command modules import torch, transformers and the stages inside the
command, never at their top.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import quantkit
from quantkit.cli import bench, compare, eval, generate, inspect, methods, quantize, report
from quantkit.cli.console import say
from quantkit.errors import QuantkitError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell reports it."""


class Commands(TyperGroup):
    """An error that is the user's to fix ends in one line on stderr; all else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuantkitError as error:
            say(f"quantkit: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("quantkit: interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Example: quantkit quantize demo --method sinq --scheme W4A16G64 -o out",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --num_fewshot as in lm-eval
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"quantkit {quantkit.__version__}")
        raise typer.Exit


@app.callback()
def _quantkit(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Quantise Hugging Face language models, measure what it cost, and reload them anywhere."""


app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("eval", epilog=eval.EXAMPLES)(eval.evaluate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("methods", epilog=methods.EXAMPLES)(methods.methods)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
