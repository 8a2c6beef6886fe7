"""The command line: parse, call the API, print. No logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.errors import AutopruneError
from autoprune.version import __version__

if TYPE_CHECKING:  # imported by the commands that need it: --help does not wait for the agents
    from autoprune.run import Run

INTERRUPTED = 130  # the status typer exits with after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Learns where a PyTorch model can be pruned, prunes it, and repacks it so that it is really faster.\n\n"
    "Example: autoprune run configs/digits.toml",
)

ConfigPath = Annotated[Path, typer.Argument(help="A TOML config, e.g. configs/digits.toml.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run is kept and resumed from. [default: runs/<config name>]")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. --set search.episodes=50.")
]


def _run(config: Path, run_dir: Path | None, overrides: list[str] | None, *, fresh_table: bool = False) -> Run:
    from autoprune.config import load_config
    from autoprune.report.console import Console
    from autoprune.run import Run

    loaded = load_config(config, overrides or [])
    return Run(loaded, run_dir or Path("runs") / config.stem, progress=Console(), fresh_table=fresh_table)


@app.command()
def run(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """The whole job: train dense, profile, search, fine-tune, repack, measure, report.

    A stopped run goes on where it was when the same command is given again.

    Example: autoprune run configs/digits.toml --set target.speedup=3
    """
    from autoprune.results import write_report

    job = _run(config, run_dir, overrides)
    if (job.directory / "report.md").exists():
        typer.echo((job.directory / "report.md").read_text(encoding="utf-8"))
        typer.echo(f"This run is complete: {job.directory}. Give another --run-dir, or delete it, to run again.")
        return
    typer.echo(write_report(job))
    typer.echo(f"Written to {job.directory}. Watch the search: tensorboard --logdir {job.directory.parent}")


@app.command()
def profile(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again even if there is a table.")] = False,
) -> None:
    """Measure the per-layer latency table with the real kernels, on this machine.

    Example: autoprune profile configs/digits.toml --force
    """
    from autoprune.results import latency_text

    typer.echo(latency_text(_run(config, run_dir, overrides, fresh_table=force).table))


@app.command()
def train(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Train the agent: search for a plan and save the policy.

    Example: autoprune train configs/digits.toml --set search.agent=sac
    """
    job = _run(config, run_dir, overrides)
    best = job.found.best
    plan = job.plan
    typer.echo(
        f"{len(job.found.trials)} trials; the best has {100 * best['accuracy']:.2f}% validation accuracy at "
        f"{best['speedup']:.2f}x. {len(plan.layers)} layers planned: {job.directory / 'plan.json'}. "
        f"Policy: {job.directory / 'policy'}"
    )


@app.command()
def prune(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    plan: Annotated[Path | None, typer.Option(help="A plan to apply in place of a searched one.")] = None,
) -> None:
    """Mask the dense model by the plan, without fine-tuning.

    Example: autoprune prune configs/digits.toml --plan runs/digits/plan.json --run-dir runs/again
    """
    job = _run(config, run_dir, overrides)
    if plan is not None:
        job.adopt(plan)
    accuracy = job.task.evaluate(job.pruned)
    typer.echo(
        f"pruned, not fine-tuned: {100 * accuracy:.2f}% validation accuracy (dense {100 * job.dense_accuracy:.2f}%). "
        f"{job.directory / 'pruned.safetensors'}"
    )


@app.command()
def finetune(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Fine-tune the plan's masked model.

    Example: autoprune finetune configs/digits.toml
    """
    job = _run(config, run_dir, overrides)
    accuracy = job.task.evaluate(job.masked)
    typer.echo(f"fine-tuned: {100 * accuracy:.2f}% validation accuracy. {job.directory / 'masked.safetensors'}")


@app.command()
def repack(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Repack the masked model into smaller dense work, backends chosen by measurement.

    Example: autoprune repack configs/digits.toml
    """
    from autoprune.results import repack_text

    job = _run(config, run_dir, overrides)
    typer.echo(repack_text(job.repacked))
    typer.echo(f"Written: {job.directory / 'repacked.safetensors'}")


@app.command()
def bench(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Measure the final table again: dense engines, masked and repacked model, in turns.

    Example: autoprune bench configs/digits.toml
    """
    from autoprune.report.table import result_table
    from autoprune.results import results

    typer.echo(result_table(results(_run(config, run_dir, overrides), again=True)))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/digits.")]) -> None:
    """Write the report of a run again and print it; missing stages are run first.

    Example: autoprune report runs/digits
    """
    from autoprune.config import parse_config
    from autoprune.files import read_json
    from autoprune.report.console import Console
    from autoprune.results import write_report
    from autoprune.run import Run

    path = run_dir / "config.json"
    config = parse_config(read_json(path, "the run's config"), str(path))
    typer.echo(write_report(Run(config, run_dir, progress=Console())))


@app.command()
def apply(
    policy: Annotated[Path, typer.Option(help="The policy's folder, e.g. runs/digits/policy.")],
    model: Annotated[str, typer.Option(help="package.module:function returning the trained nn.Module.")],
    data: Annotated[str, typer.Option(help="package.module:function returning (train_loader, validation_loader).")],
    speedup: Annotated[float | None, typer.Option(help="At least this speed-up over dense torch eager.")] = None,
    accuracy_drop: Annotated[
        float | None, typer.Option(help="At most this drop, as a fraction: 0.01 is a point.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the pruned, repacked model and the report go.")] = Path(
        "runs/applied"
    ),
    episodes: Annotated[int, typer.Option(help="1 takes the policy's plan; more try plans around it.", min=1)] = 1,
    overrides: Overrides = None,
) -> None:
    """Apply a learned policy to your own model: plan, prune, fine-tune, repack, measure.

    Example: autoprune apply --policy runs/digits/policy --model my.models:build --data my.data:loaders --speedup 2
    """
    from autoprune.api import apply_config
    from autoprune.config import parse_overrides
    from autoprune.report.console import Console
    from autoprune.results import write_report
    from autoprune.run import Run
    from autoprune.target import Target

    target = Target(speedup=speedup, accuracy_drop=accuracy_drop)
    config = apply_config(policy, model, data, target, episodes, parse_overrides(overrides or []))
    typer.echo(write_report(Run(config, out, progress=Console())))
    typer.echo(f"Written to {out}.")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"autoprune {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: one paragraph and a non-zero status for what a user can mend, Ctrl-C without a traceback."""
    try:
        app()
    except AutopruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("stopped; give the same command again to go on from here.", err=True)
        raise
