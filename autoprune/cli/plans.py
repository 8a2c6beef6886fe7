"""Commands about one plan: prune, finetune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.options import (
    ConfigPath,
    DryRun,
    Overrides,
    Precision,
    ReportOptions,
    RunDir,
    Seed,
    TargetOptions,
    changes,
    only_for,
    open_run,
    with_groups,
)
from autoprune.cli.output import MISSED, finish, show_forecast
from autoprune.cli.registries import completed
from autoprune.errors import ConfigError

POST_TRAINING = ("finetune.post_training=true", "env.recovery=post_training")
CRITERION = '{name = "obs", steps = 4}'  # of post-training pruning, unless another is asked for


# long: a parameter is an option, with what --help says of it
@with_groups
def prune(
    config: ConfigPath,
    target: TargetOptions,
    shown: ReportOptions,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    plan: Annotated[Path | None, typer.Option(help="A plan to apply in place of a searched one.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Prune to the end without a search, by a training method: adaptive; joint,gradual; or all.",
            autocompletion=completed("methods"),
        ),
    ] = None,
    post_training: Annotated[
        bool,
        typer.Option(
            "--post-training",
            help="Prune to the end without a search, labels and training: in minutes.",
        ),
    ] = False,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="With --method or --post-training: e.g. magnitude. [default: the config's; with --post-training: "
            f"{CRITERION}]",
            autocompletion=completed("criteria"),
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help='With --method or --post-training: e.g. unstructured, or {name = "group", size = 16}.',
            autocompletion=completed("patterns"),
        ),
    ] = None,
    seed: Seed = None,
    precision: Precision = None,
    dry_run: DryRun = False,
) -> None:
    """Mask the dense model by the plan, without fine-tuning; with --method: prune, train and measure without a search.

    With --post-training: prune without labels and training, and measure.

    Example: autoprune prune configs/digits.toml --plan runs/digits/plan.json --run-dir runs/again

    Example: autoprune prune configs/digits.toml --method adaptive --sparsity 0.9

    Example: autoprune prune configs/digits.toml --method all --sparsity 0.9

    Example: autoprune prune configs/digits.toml --post-training --sparsity 0.5

    Example: autoprune prune configs/digits.toml --method gradual --speedup 4 --pattern '{name = "group", size = 16}'

    Example: autoprune prune configs/digits.toml --method gradual --speedup 3 --precision int8

    Example: autoprune prune configs/digits.toml --method gradual --latency-ms 0.2 --dry-run
    """
    from autoprune.config import load_config

    _check_together(method, post_training, plan)
    if method is not None or post_training:
        chosen = {"env.pattern": pattern, "env.criterion": criterion or (CRITERION if post_training else None)}
        named = [f"{key}={value}" for key, value in chosen.items() if value is not None]
        changed = [*changes(target, seed, precision), *named, *(overrides or [])]
        if method is None:
            _prune_post_training(config, run_dir, changed, shown, dry_run)
        else:
            _prune_by(method, config, run_dir, changed, shown, dry_run)
        return
    only_for("--method or --post-training", {**target.given, "--pattern": pattern, "--criterion": criterion})
    changed = [*changes(target, seed, precision), *(overrides or [])]
    if dry_run:
        directory = run_dir or Path("runs") / config.stem
        show_forecast(load_config(config, changed), directory, shown, searches=plan is None, trains=False)
        return
    only_for("--method or --post-training", {"--json": shown.as_json or None, "--strict": shown.strict or None})
    job = open_run(config, run_dir, changed, progress=shown.progress)
    if plan is not None:
        job.adopt(plan)
    metric, score = job.task.metric, job.task.evaluate(job.pruned)
    typer.echo(
        f"pruned, not fine-tuned: validation {metric.describe(score)} (dense {metric.text(job.prepared.dense_score)}). "
        f"{job.directory / 'pruned.safetensors'}"
    )


def _check_together(method: str | None, post_training: bool, plan: Path | None) -> None:
    """Raises ConfigError where two ways to prune are asked for."""
    if method is not None and post_training:
        raise ConfigError(
            "--method and --post-training exclude each other: a method trains, and post-training pruning does not. "
            "Give one of them."
        )
    if method is not None and plan is not None:
        raise ConfigError("--plan and --method exclude each other: a plan names its own method.")
    if post_training and plan is not None:
        raise ConfigError(
            "--plan and --post-training exclude each other: a plan has sparsities, patterns and criteria of its own. "
            "In Python, autoprune.prune_post_training(model, batches, plan=plan) takes one."
        )


def _prune_post_training(
    config: Path, run_dir: Path | None, overrides: list[str], shown: ReportOptions, dry_run: bool
) -> None:
    """The whole job without a search and without training."""
    from autoprune.config import load_config

    changed = [*POST_TRAINING, *overrides]
    directory = run_dir or Path("runs") / f"{config.stem}-post-training"
    if dry_run:
        show_forecast(load_config(config, changed), directory, shown, searches=False)
        return
    job = open_run(config, directory, changed, progress=shown.progress)
    job.plan_uniformly()
    finish(job, shown, "")


def _prune_by(
    method: str, config: Path, run_dir: Path | None, overrides: list[str], shown: ReportOptions, dry_run: bool
) -> None:
    """The whole job without a search."""
    from autoprune.config import load_config
    from autoprune.pipeline.methods import compare_methods
    from autoprune.training import TRAINING

    def by(name: str) -> list[str]:
        return [
            f"finetune.method={json.dumps(name)}",
            "finetune.post_training=false",
            *overrides,
        ]  # as TOML quotes it too

    methods = list(TRAINING) if method == "all" else list(dict.fromkeys(method.split(",")))
    directory = run_dir or Path("runs") / f"{config.stem}-{method if len(methods) == 1 else 'methods'}"
    if dry_run:
        show_forecast(load_config(config, by(methods[0])), directory, shown, searches=False)
        return
    if len(methods) > 1:
        configs = {name: load_config(config, by(name)) for name in methods}
        compared = compare_methods(configs, directory, shown.progress)
        if shown.as_json:
            typer.echo(json.dumps(compared.to_json()))
        else:
            typer.echo(compared.page)
            typer.echo(f"Written to {directory / 'methods.md'}. Watch the training: tensorboard --logdir {directory}")
        if shown.strict and compared.missed:
            raise typer.Exit(MISSED)
        return
    job = open_run(config, directory, by(method), progress=shown.progress)
    job.plan_uniformly()
    finish(job, shown, f" Watch the training: tensorboard --logdir {job.directory}")


def finetune(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Fine-tune the plan's masked model.

    Example: autoprune finetune configs/digits.toml
    """
    job = open_run(config, run_dir, overrides)
    score = job.task.metric.describe(job.task.evaluate(job.masked))
    typer.echo(f"fine-tuned: validation {score}. {job.directory / 'masked.safetensors'}")
