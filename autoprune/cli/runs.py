"""Commands about a whole run: run, profile, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.options import (
    AsJson,
    ConfigPath,
    DryRun,
    Minutes,
    Overrides,
    Precision,
    Ray,
    ReportOptions,
    RunDir,
    Seed,
    TargetOptions,
    Workers,
    changes,
    checked_minutes,
    in_precision,
    open_run,
    with_groups,
)
from autoprune.cli.output import finish, show_forecast, show_report


@with_groups
def run(
    config: ConfigPath,
    target: TargetOptions,
    shown: ReportOptions,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    seed: Seed = None,
    precision: Precision = None,
    workers: Workers = None,
    ray: Ray = None,
    minutes: Minutes = None,
    dry_run: DryRun = False,
) -> None:
    """The whole job: train dense, profile, search, fine-tune, repack, measure, report.

    A stopped run goes on where it was when the same command is given again.

    Example: autoprune run configs/digits.toml --speedup 3 --over eager

    Example: autoprune run configs/digits.toml --size 60kB --accuracy-drop 0.01 --strict --json

    Example: autoprune run configs/digits.toml --precision int8

    Example: autoprune run configs/digits.toml --minutes 30

    Example: autoprune run configs/digits.toml --speedup 5 --dry-run

    Example: autoprune run configs/digits.toml --ray auto

    Example: autoprune run digits --set device.target=aarch64 --set 'device.run=qemu-aarch64-static {file}'
    """
    from autoprune.config import load_config

    given = [*changes(target, seed, precision), *(overrides or [])]
    if dry_run:
        directory = run_dir or Path("runs") / config.stem
        show_forecast(load_config(config, given), directory, shown, minutes=checked_minutes(minutes), workers=workers)
        return
    job = open_run(
        config, run_dir, given, workers=workers, ray=ray, minutes=minutes, finished=True, progress=shown.progress
    )
    finish(job, shown, f" Watch the search: tensorboard --logdir {job.directory.parent}")


def profile(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    precision: Precision = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again even if there is a table.")] = False,
) -> None:
    """Measure the per-layer latency table with the real kernels, on this machine or the config's device.

    Example: autoprune profile configs/digits.toml --force

    Example: autoprune profile configs/digits.toml --precision int8
    """
    from autoprune.pipeline.results import latency_text

    given = [*in_precision(precision), *(overrides or [])]
    typer.echo(latency_text(open_run(config, run_dir, given, fresh_table=force).preparation.table))


def report(
    run_dir: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/digits.")],
    as_json: AsJson = False,
) -> None:
    """Write the report of a finished run again, from what its directory holds, and print it. Runs no code of yours.

    Example: autoprune report runs/digits

    Example: autoprune report runs/digits --json
    """
    from autoprune.report.stored import write_page

    write_page(run_dir)
    show_report(run_dir, ReportOptions(as_json=as_json))
