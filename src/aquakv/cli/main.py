"""The command line: thin argument parsing over the public API."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from aquakv._version import __version__
from aquakv.cli.commands import bench, calibrate, demo, evaluate, generate, inspect, report
from aquakv.errors import InputError

# Recent typer carries its own copy of click: take the base of its usage errors from what it exports.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]

# What typer makes of a KeyboardInterrupt inside a command.
_INTERRUPTED = 130

app = typer.Typer(name="aquakv", add_completion=False, pretty_exceptions_enable=False)
app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("inspect")(inspect.inspect)
app.add_typer(evaluate.app, name="eval")
app.command("generate")(generate.generate)
app.add_typer(bench.app, name="bench")
app.command("report")(report.report)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"aquakv {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", callback=_version, is_eager=True
    ),
) -> None:
    """Compress the KV caches of language models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit code 0 done, 2 bad usage or input (one line on stderr), 1 anything else."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(args=arguments, standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 1)
    except _ClickError as error:
        _fail(f"{error.format_message()} (see --help)", 2)  # type: ignore[attr-defined]
    else:
        if code == _INTERRUPTED:
            _fail("interrupted", 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    typer.echo(f"aquakv: {' '.join(message.split())}", err=True)
    sys.exit(code)
