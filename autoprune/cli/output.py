"""How a command ends that has a report: the page, or one JSON object, the headline, and the status."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from autoprune.cli.options import ReportOptions

if TYPE_CHECKING:  # imported when a command runs: --help does not wait for torch
    from autoprune.config import Config
    from autoprune.pipeline.run import Run

REFUSED = 2  # the status where a command cannot be done; the reason is on stderr
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


def finish(job: Run, options: ReportOptions, watch: str) -> None:
    """Does what is left of a run with a plan or a search, writes its report and shows it; raises as `show_report`.

    Of a run that is complete the report is shown, and that it is.

    Args:
        job: the run.
        options: what to print.
        watch: what TensorBoard has of it, and where.
    """
    from autoprune.pipeline.results import report_of
    from autoprune.report.run_report import write_report

    _ = job.task  # refused where the directory was made with another one
    if job.complete:
        again = f"This run is complete: {job.directory}. Give another --run-dir, or delete it, to run again.\n"
        show_report(job.directory, options, again)
        return
    job.settle()
    write_report(report_of(job))
    show_report(job.directory, options, f"Written to {job.directory}.{watch}\n")


def show_forecast(
    config: Config,
    directory: Path,
    options: ReportOptions,
    *,
    searches: bool = True,
    trains: bool = True,
    minutes: float | None = None,
    workers: int | None = None,
) -> None:
    """Prints what a run would do; all that has to be measured for it is measured in a temporary folder.

    Args:
        config: of the run.
        directory: where it would be kept; what it holds is read, and left as it is.
        options: what to print.
        searches: whether the run searches for its plan.
        trains: whether it fine-tunes it and measures the result.
        minutes: that the search is given.
        workers: that evaluate its trials.

    Raises:
        InfeasibleTarget: after it was printed, where the run would be refused; typer.Exit after a JSON object.
        ConfigError: the directory is another run's.
    """
    from autoprune.config import check_directory
    from autoprune.files import temporary_folder
    from autoprune.pipeline.forecast import copy_for_forecast, forecast
    from autoprune.pipeline.run import Run

    check_directory(directory, config.to_json())
    with temporary_folder() as folder:
        copy_for_forecast(directory, folder)
        run = Run(config, folder, progress=options.progress, minutes=minutes, workers=workers)
        with closing(run.lock):
            found = forecast(run, searches=searches, trains=trains)
    if options.as_json:
        said = {**found.to_json(), "run_dir": str(directory)}
        refused = {} if found.refusal is None else {"error": str(found.refusal)}
        typer.echo(json.dumps({**said, **refused}))
        if refused:
            typer.echo(f"error: {found.refusal}", err=True)
            raise typer.Exit(REFUSED)
        return
    typer.echo(found.text())
    typer.echo(f"Nothing was changed in {directory}: this was measured in a temporary folder.")
    if found.refusal is not None:
        raise found.refusal
