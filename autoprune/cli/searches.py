"""Commands that search or use what a search learned: train, compare, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.options import (
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
    checked_minutes,
    console,
    in_precision,
    open_run,
    with_groups,
)
from autoprune.cli.output import finish, show_forecast
from autoprune.cli.registries import completed_list
from autoprune.errors import ConfigError


def train(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Train the agent: search for a plan and save the policy; of a family of tasks, a policy for any model or training.

    Example: autoprune train configs/digits.toml --set search.agent=sac

    Example: autoprune train configs/generalist.toml --set family.tasks=40

    Example: autoprune train configs/steering.toml --set learning.updates=60
    """
    from autoprune.config import has_table

    if has_table(config, "family"):
        _train_generalist(config, run_dir, overrides, workers, ray)
        return
    if has_table(config, "steering"):
        _train_steering(config, run_dir, overrides, workers, ray)
        return
    job = open_run(config, run_dir, overrides, workers=workers, ray=ray)
    best = job.searched.best.measurement
    plan = job.plan
    typer.echo(
        f"{len(job.searched.trials)} trials; the best has a validation {job.task.metric.describe(best.score)} at "
        f"{best.speedup:.2f}x. {len(plan.layers)} layers planned: {job.directory / 'plan.json'}. "
        f"Policy: {job.directory / 'policy'}"
    )


def _train_generalist(
    config: Path, run_dir: Path | None, overrides: list[str] | None, workers: int | None, ray: str | None
) -> None:
    from autoprune.config import load_generalist_config
    from autoprune.pipeline.generalist import Generalist

    if ray is not None:
        raise ConfigError("a generalist's tasks are made in processes of this machine: give --workers, not --ray.")
    loaded = load_generalist_config(config, overrides or [])
    directory = run_dir or Path("runs") / config.stem
    best = Generalist(loaded, directory, progress=console(), workers=workers).train()
    typer.echo(
        f"The policy of update {best.update + 1} is kept: its plans are {100 * best.learned:+.1f}% of the knapsack's "
        f"loss better on tasks it learned from, {100 * best.choosing:+.1f}% on those that chose it, "
        f"{100 * best.held_out:+.1f}% on tasks of other builds, by their surrogates. {directory / 'policy'}\n"
        f"Watch: tensorboard --logdir {directory}. Apply: autoprune apply --policy {directory / 'policy'} ..."
    )


def _train_steering(
    config: Path, run_dir: Path | None, overrides: list[str] | None, workers: int | None, ray: str | None
) -> None:
    from autoprune.config import load_as
    from autoprune.pipeline.steering import SteeringConfig, SteeringTraining

    if ray is not None or workers is not None:
        raise ConfigError("steering is learned in one process: leave out --workers and --ray.")
    directory = run_dir or Path("runs") / config.stem
    loaded = load_as(SteeringConfig, config, overrides or [])
    best = SteeringTraining(loaded, directory, progress=console()).train()
    typer.echo(
        f"The policy of update {best.update + 1} is kept: its trainings are {best.choosing:+.2f} of the best fixed "
        f"schedule's loss better than that, on the tasks that chose it. {directory / 'policy'}\n"
        f'Use it: finetune.method = {{ name = "steered", path = "{directory / "policy"}" }}'
    )


def compare(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    agents: Annotated[
        str,
        typer.Option(
            help="Agents, as autoprune agents lists them, e.g. knapsack,tpe,policy.",
            autocompletion=completed_list("agents"),
        ),
    ] = "uniform,greedy,knapsack,restarts,random,tpe,cma_es,evopress,policy,five_recipes",
    evaluations: Annotated[str, typer.Option(help="Checkpoints, e.g. 0,1,10,50.")] = "0,1,10,50",
    seeds: Annotated[int, typer.Option(help="Searches of each agent, of seeds 0, 1, ...", min=1)] = 3,
    finetune: Annotated[
        bool,
        typer.Option(help="Fine-tune every plan of the last checkpoint and judge by the test score after that."),
    ] = True,
) -> None:
    """Compare agents at the same number of evaluations and the same measured speed-up, on the task of a config.

    They are judged by what their plans score after the config's fine-tuning; --no-finetune leaves that out. The entrant
    five_recipes is no agent: it trains five plans to the end and takes the best on the validation split.

    A stopped comparison goes on where it was when the same command is given again.

    Example: autoprune compare configs/digits.toml --set target={speedup=9} --agents knapsack,tpe,policy --seeds 3
    """
    from autoprune.pipeline.compare import compare_run

    given = (agents.split(","), evaluations.split(","), seeds)
    typer.echo(compare_run(config, run_dir, overrides or [], *given, console(), finetune=finetune))


# long: a parameter is an option, with what --help says of it
@with_groups
def apply(
    model: Annotated[str, typer.Option(help="package.module:function returning the trained nn.Module.")],
    data: Annotated[str, typer.Option(help="package.module:function returning (train_loader, validation_loader).")],
    target: TargetOptions,
    shown: ReportOptions,
    loss: Annotated[
        str | None,
        typer.Option(
            help="cross_entropy, mse, l1, huber, bce_with_logits, model, none, or package.module:function. "
            "[default: what fits the data]"
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            help="accuracy, iou, f1, mse, rmse, bits, perplexity, fidelity, or package.module:function(model, loader). "
            "[default: what fits the data]"
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="How the figure of your --evaluate reads: one of its names, or package.module:Metric."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy's folder, e.g. runs/digits/policy. [default: the one that comes along]"),
    ] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="Where the run is kept and resumed from: the fast model and the report.")
    ] = Path("runs/applied"),
    episodes: Annotated[
        int | None,
        typer.Option(
            help="1 takes the policy's plan; more refine it, and never end below it. [default: 1; with --minutes 100]",
            min=1,
        ),
    ] = None,
    overrides: Overrides = None,
    seed: Seed = None,
    precision: Precision = None,
    workers: Workers = None,
    ray: Ray = None,
    minutes: Minutes = None,
    dry_run: DryRun = False,
) -> None:
    """Apply a learned policy to your own model: plan, prune, fine-tune, repack, measure.

    Example: autoprune apply --model my.models:build --data my.data:loaders --speedup 3

    Example: autoprune apply --model my.models:build --data my.data:loaders --speedup 3 --episodes 50 --policy runs/mine

    Example: autoprune apply --model my.models:build --data my.data:loaders --speedup 2 --precision int8

    Example: autoprune apply --model my.models:build --data my.data:loaders --accuracy-drop 0.01 --minutes 20
    """
    from autoprune.api import apply_config
    from autoprune.config import SearchSection, parse_overrides
    from autoprune.pipeline.run import Run
    from autoprune.target import Target

    if episodes is None:
        episodes = 1 if minutes is None else SearchSection().episodes
    named = {"loss": loss, "evaluate": evaluate, "metric": metric}
    drawn = [] if seed is None else [f"seed={seed}"]
    changed = parse_overrides([*drawn, *in_precision(precision), *(overrides or [])])
    config = apply_config(policy, model, data, target.target() or Target(), episodes, changed, **named)
    if dry_run:
        show_forecast(config, run_dir, shown, minutes=checked_minutes(minutes), workers=workers)
        return
    job = Run(config, run_dir, progress=shown.progress, workers=workers, ray=ray, minutes=checked_minutes(minutes))
    finish(job, shown, "")
