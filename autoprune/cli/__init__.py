"""The command line: parse, call the API, print. No logic.

Commands import what they need when they run: ``--help`` waits neither for torch nor for the agents.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from autoprune.cli.building import build
from autoprune.cli.models import bench, export, repack, shrink
from autoprune.cli.output import REFUSED
from autoprune.cli.plans import finetune, prune
from autoprune.cli.registries import LISTED, listing
from autoprune.cli.runs import profile, report, run
from autoprune.cli.searches import apply, compare, train
from autoprune.cli.starting import init
from autoprune.errors import AutopruneError
from autoprune.processes.stopping import STATUSES, unwind_on_signals
from autoprune.processes.workers import end_forks_with_this
from autoprune.version import __version__

INTERRUPTED = 130  # the status typer exits with after Ctrl-C
COMMANDS = (
    init,
    run,
    profile,
    train,
    compare,
    prune,
    finetune,
    repack,
    shrink,
    bench,
    export,
    build,
    report,
    apply,
)  # as --help lists them

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Learns where a PyTorch model can be pruned, prunes it, and repacks it so that it is really faster.\n\n"
    "Example: autoprune run digits",
)
for command in COMMANDS:
    app.command()(command)
for listed in LISTED:
    app.command(rich_help_panel="What a config may name")(listing(listed))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"autoprune {__version__}")
        raise typer.Exit


def _refusing() -> None:
    try:
        app()
    except AutopruneError as error:
        reason = str(error)
    except OSError as error:
        what = error.filename or type(error).__name__
        reason = f"{what}: {error.strerror or error}. Once that is mended, the same command goes on."
    else:
        return
    typer.echo(f"error: {reason}", err=True)
    if "--json" in sys.argv[1:]:
        typer.echo(json.dumps({"error": reason}))
    sys.exit(REFUSED)


def main() -> None:
    """Entry point: one paragraph and a status for what a user can mend; Ctrl-C and `kill` without a traceback."""
    end_forks_with_this()
    unwind_on_signals()
    try:
        _refusing()
    except SystemExit as stop:
        if stop.code in (INTERRUPTED, *STATUSES):
            typer.echo("stopped; give the same command again to go on from here.", err=True)
        raise
