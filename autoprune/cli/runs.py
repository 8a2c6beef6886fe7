"""Commands about a whole run: run, profile, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.options import ConfigPath, Overrides, Ray, RunDir, Workers, open_run


def run(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """The whole job: train dense, profile, search, fine-tune, repack, measure, report.

    A stopped run goes on where it was when the same command is given again.

    Example: autoprune run configs/digits.toml --set target.speedup=3

    Example: autoprune run configs/digits.toml --ray auto
    """
    from autoprune.files import read_text
    from autoprune.pipeline.results import report_of
    from autoprune.report.run_report import write_report

    job = open_run(config, run_dir, overrides, workers=workers, ray=ray, finished=True)
    _ = job.task  # refused where the directory was made with another one
    if job.complete:
        typer.echo(read_text(job.directory / "report.md", "the report"))
        typer.echo(f"This run is complete: {job.directory}. Give another --run-dir, or delete it, to run again.")
        return
    job.settle()
    typer.echo(write_report(report_of(job)))
    typer.echo(f"Written to {job.directory}. Watch the search: tensorboard --logdir {job.directory.parent}")


def profile(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again even if there is a table.")] = False,
) -> None:
    """Measure the per-layer latency table with the real kernels, on this machine.

    Example: autoprune profile configs/digits.toml --force
    """
    from autoprune.pipeline.results import latency_text

    typer.echo(latency_text(open_run(config, run_dir, overrides, fresh_table=force).preparation.table))


def report(run_dir: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/digits.")]) -> None:
    """Write the report of a finished run again, from what its directory holds, and print it. Runs no code of yours.

    Example: autoprune report runs/digits
    """
    from autoprune.report.stored import write_page

    typer.echo(write_page(run_dir))
