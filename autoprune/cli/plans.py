"""Commands about one plan: prune, finetune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.options import ConfigPath, Overrides, RunDir, only_for, open_run
from autoprune.errors import ConfigError


def prune(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    plan: Annotated[Path | None, typer.Option(help="A plan to apply in place of a searched one.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Prune without a search, by this training method, e.g. adaptive; to the end.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="With --method: share of zeros, in (0, 1).")] = None,
    speedup: Annotated[float | None, typer.Option(help="With --method: as measured here, above 1.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help='With --method: e.g. unstructured, or {name = "group", size = 16}.')
    ] = None,
) -> None:
    """Mask the dense model by the plan, without fine-tuning; with --method: prune, train and measure without a search.

    Example: autoprune prune configs/digits.toml --plan runs/digits/plan.json --run-dir runs/again

    Example: autoprune prune configs/digits.toml --method adaptive --sparsity 0.9

    Example: autoprune prune configs/digits.toml --method gradual --speedup 4 --pattern '{name = "group", size = 16}'
    """
    if method is not None:
        if plan is not None:
            raise ConfigError("--plan and --method exclude each other: a plan names its own method.")
        _prune_by(method, config, run_dir, overrides or [], sparsity, speedup, pattern)
        return
    only_for("--method", {"--sparsity": sparsity, "--speedup": speedup, "--pattern": pattern})
    job = open_run(config, run_dir, overrides)
    if plan is not None:
        job.adopt(plan)
    metric, score = job.task.metric, job.task.evaluate(job.pruned)
    typer.echo(
        f"pruned, not fine-tuned: validation {metric.describe(score)} (dense {metric.text(job.prepared.dense_score)}). "
        f"{job.directory / 'pruned.safetensors'}"
    )


def _prune_by(
    method: str,
    config: Path,
    run_dir: Path | None,
    overrides: list[str],
    sparsity: float | None,
    speedup: float | None,
    pattern: str | None,
) -> None:
    """The whole job without a search."""
    from autoprune.pipeline.results import report_of
    from autoprune.report.run_report import write_report

    if sparsity is not None and speedup is not None:
        raise ConfigError("give --sparsity or --speedup, not both.")
    given = [f"finetune.method={json.dumps(method)}"]  # as TOML quotes it too
    given += [f"target={{sparsity = {sparsity}}}"] if sparsity is not None else []
    given += [f"target={{speedup = {speedup}}}"] if speedup is not None else []
    given += [f"env.pattern={pattern}"] if pattern is not None else []
    job = open_run(config, run_dir or Path("runs") / f"{config.stem}-{method}", [*given, *overrides])
    job.plan_uniformly()
    job.settle()
    typer.echo(write_report(report_of(job)))
    typer.echo(f"Written to {job.directory}. Watch the training: tensorboard --logdir {job.directory}")


def finetune(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Fine-tune the plan's masked model.

    Example: autoprune finetune configs/digits.toml
    """
    job = open_run(config, run_dir, overrides)
    score = job.task.metric.describe(job.task.evaluate(job.masked))
    typer.echo(f"fine-tuned: validation {score}. {job.directory / 'masked.safetensors'}")
