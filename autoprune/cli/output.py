"""How a command ends that has a report: the page, or one JSON object, the headline, and the status."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from autoprune.cli.options import ReportOptions

MISSED = 3  # the status where --strict was given and the target was missed


def show_report(directory: Path, options: ReportOptions, remark: str = "") -> None:
    """Prints what came of a run, the headline last.

    Args:
        directory: of the finished run.
        options: what to print, and whether a missed target is a failure.
        remark: printed below the page; no part of the JSON object.

    Raises:
        typer.Exit: with `MISSED`.
    """
    from autoprune.files import read_text
    from autoprune.report.summary import Summary

    summary = Summary.read(directory)
    if options.as_json:
        typer.echo(json.dumps(summary.to_json()))
    else:
        parts = (read_text(directory / "report.md", "the report"), remark, summary.headline.replace("**", ""))
        typer.echo("\n".join(part for part in parts if part))
    if options.strict and summary.missed:
        raise typer.Exit(MISSED)
