"""The command line: parse, call the API, print. No logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.errors import AutopruneError, ConfigError
from autoprune.processes.workers import end_forks_with_this
from autoprune.version import __version__

if TYPE_CHECKING:  # imported by the commands that need it: --help does not wait for the agents
    from torch import nn

    from autoprune.pipeline.run import Run
    from autoprune.report.console import Console

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

# Of the commands that search.
Workers = Annotated[
    int | None, typer.Option(help="Processes that evaluate trials. They change no result. [default: one a core]", min=1)
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Ray cluster that evaluates trials: auto, HOST:PORT; local starts one."),
]

# Of the commands that take a run's config or a model's function.
ConfigOrFunction = Annotated[
    str, typer.Argument(help="A TOML config, or package.module:function returning an nn.Module.", show_default=False)
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="Of a function's model: 1,3,224,224, batch first; once an input."),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="TYPE", help="float32 or int64: one for all inputs, or one each."),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads of one inference of a function's model. [default: 1]", min=1)
]
Save = Annotated[Path | None, typer.Option(help="Where a function's repacked model is written.")]
ValueBits = Annotated[
    int | None,
    typer.Option(help="With --save: 8 writes rounded weights, a file about a quarter the size. [default: 32]"),
]


def _is_function(target: str) -> bool:
    return ":" in target and not target.endswith(".toml") and not Path(target).exists()


def _only_for(what: str, options: dict[str, object]) -> None:
    """Options that would be ignored are an error."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} is for {what} alone; leave it out, or give {what}.")


def _model(path: str) -> nn.Module:
    from autoprune.tasks.user import user_model

    return user_model("model", path)


def _console() -> Console:
    from autoprune.report.console import Console

    return Console()


def _run(
    config: Path,
    run_dir: Path | None,
    overrides: list[str] | None,
    *,
    fresh_table: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    finished: bool = False,
) -> Run:
    """The run of a config, its directory locked; not that of a `finished` run that is only read."""
    from autoprune.config import load_config
    from autoprune.pipeline.run import Run

    loaded = load_config(config, overrides or [])
    directory = run_dir or Path("runs") / config.stem
    made = Run(loaded, directory, progress=_console(), fresh_table=fresh_table, workers=workers, ray=ray)
    if directory.exists() and not (finished and (directory / "report.md").exists()):
        made.lock.take()  # at once: a new directory is made, and locked, when the task has proved to work
    return made


@app.command()
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

    job = _run(config, run_dir, overrides, workers=workers, ray=ray, finished=True)
    _ = job.task  # refused where the directory was made with another one
    if job.complete:
        typer.echo(read_text(job.directory / "report.md", "the report"))
        typer.echo(f"This run is complete: {job.directory}. Give another --run-dir, or delete it, to run again.")
        return
    typer.echo(write_report(report_of(job)))
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
    from autoprune.pipeline.results import latency_text

    typer.echo(latency_text(_run(config, run_dir, overrides, fresh_table=force).preparation.table))


@app.command()
def train(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Train the agent: search for a plan and save the policy; of a family of tasks, a policy for any model.

    Example: autoprune train configs/digits.toml --set search.agent=sac

    Example: autoprune train configs/generalist.toml --set family.tasks=40
    """
    from autoprune.config import is_generalist

    if is_generalist(config):
        _train_generalist(config, run_dir, overrides, workers, ray)
        return
    job = _run(config, run_dir, overrides, workers=workers, ray=ray)
    best = job.searched.best.measurement
    plan = job.plan
    typer.echo(
        f"{len(job.searched.trials)} trials; the best has a validation {job.task.metric.said(best.score)} at "
        f"{best.speedup:.2f}x. {len(plan.layers)} layers planned: {job.directory / 'plan.json'}. "
        f"Policy: {job.directory / 'policy'}"
    )


def _train_generalist(
    config: Path, run_dir: Path | None, overrides: list[str] | None, workers: int | None, ray: str | None
) -> None:
    from autoprune.config import load_generalist_config
    from autoprune.errors import ConfigError
    from autoprune.pipeline.generalist import Generalist

    if ray is not None:
        raise ConfigError("a generalist's tasks are made in processes of this machine: give --workers, not --ray.")
    loaded = load_generalist_config(config, overrides or [])
    directory = run_dir or Path("runs") / config.stem
    best = Generalist(loaded, directory, progress=_console(), workers=workers).train()
    typer.echo(
        f"The policy of update {best.update + 1} is kept: its plans are {100 * best.learned:+.1f}% of the knapsack's "
        f"loss better on tasks it learned from, {100 * best.choosing:+.1f}% on those that chose it, "
        f"{100 * best.held_out:+.1f}% on tasks of other builds, by their surrogates. {directory / 'policy'}\n"
        f"Watch: tensorboard --logdir {directory}. Apply: autoprune apply --policy {directory / 'policy'} ..."
    )


@app.command()
def compare(
    config: ConfigPath,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    agents: Annotated[
        str, typer.Option(help="Rows of the registry, e.g. knapsack,tpe,policy.")
    ] = "uniform,greedy,knapsack,restarts,random,tpe,cma_es,policy",
    evaluations: Annotated[str, typer.Option(help="Checkpoints, e.g. 0,1,10,50.")] = "0,1,10,50",
    seeds: Annotated[int, typer.Option(help="Searches of each agent, of seeds 0, 1, ...", min=1)] = 3,
) -> None:
    """Compare agents at the same number of evaluations and the same measured speed-up, on the task of a config.

    A stopped comparison goes on where it was when the same command is given again.

    Example: autoprune compare configs/digits.toml --set target={speedup=9} --agents knapsack,tpe,policy --seeds 3
    """
    from autoprune.pipeline.compare import compare_run

    typer.echo(
        compare_run(config, run_dir, overrides or [], agents.split(","), evaluations.split(","), seeds, _console())
    )


@app.command()
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
    _only_for("--method", {"--sparsity": sparsity, "--speedup": speedup, "--pattern": pattern})
    job = _run(config, run_dir, overrides)
    if plan is not None:
        job.adopt(plan)
    metric, score = job.task.metric, job.task.evaluate(job.pruned)
    typer.echo(
        f"pruned, not fine-tuned: validation {metric.said(score)} (dense {metric.text(job.prepared.dense_score)}). "
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
    given = [f'finetune.method="{method}"']
    given += [f"target={{sparsity = {sparsity}}}"] if sparsity is not None else []
    given += [f"target={{speedup = {speedup}}}"] if speedup is not None else []
    given += [f"env.pattern={pattern}"] if pattern is not None else []
    job = _run(config, run_dir or Path("runs") / f"{config.stem}-{method}", [*given, *overrides])
    job.plan_uniformly()
    job.recalibrate()
    typer.echo(write_report(report_of(job)))
    typer.echo(f"Written to {job.directory}. Watch the training: tensorboard --logdir {job.directory}")


@app.command()
def finetune(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Fine-tune the plan's masked model.

    Example: autoprune finetune configs/digits.toml
    """
    job = _run(config, run_dir, overrides)
    said = job.task.metric.said(job.task.evaluate(job.masked))
    typer.echo(f"fine-tuned: validation {said}. {job.directory / 'masked.safetensors'}")


@app.command()
def repack(
    target: ConfigOrFunction,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    save: Save = None,
    value_bits: ValueBits = None,
) -> None:
    """Repack the masked model of a run, or any model with zeros in its weights, into smaller dense work.

    Example: autoprune repack configs/digits.toml

    Example: autoprune repack my.models:build --input 1,3,224,224 --save fast.safetensors --value-bits 8
    """
    from autoprune.bench import example_inputs, repack_shown
    from autoprune.repack import save as write
    from autoprune.repack.weights.serialized import check_value_bits
    from autoprune.report.bench_tables import repack_text

    if _is_function(target):
        _only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        if save is None:
            raise ConfigError("say where the repacked model goes: --save fast.safetensors.")
        check_value_bits(value_bits or 32)
        inputs = example_inputs(shapes or (), dtypes or ())
        fast = repack_shown(_model(target), inputs, threads or 1, _console())
        write(fast, save, value_bits=value_bits or 32)
        typer.echo(repack_text(fast))
        typer.echo(f"Written: {save}")
        return
    of_functions = {"--input": shapes, "--dtype": dtypes, "--threads": threads}
    _only_for("a function", {**of_functions, "--save": save, "--value-bits": value_bits})
    job = _run(Path(target), run_dir, overrides)
    typer.echo(repack_text(job.repacked))
    typer.echo(f"Written: {job.directory / 'repacked.safetensors'}")


@app.command()
def bench(
    target: ConfigOrFunction,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    engines: Annotated[
        str | None,
        typer.Option(help="Dense engines to compare with, e.g. channels_last,onnxruntime. [default: all there are]"),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Instead: what packed layers take in a file and fetch in an inference.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="How often every form of a function's model is timed. [default: 20]", min=1)
    ] = None,
    save: Save = None,
) -> None:
    """Measure: the final table of a run again, or any model as it stands against every dense engine, layer by layer.

    Example: autoprune bench configs/digits.toml

    Example: autoprune bench my.models:build --input 1,3,224,224 --engines channels_last,onnxruntime --threads 2

    Example: autoprune bench my.models:encoder --input 1,128 --dtype int64 --save fast.safetensors

    Example: autoprune bench my.models:build --input 1,3,224,224 --memory
    """
    if memory:
        _only_for("bench without --memory", {"--engines": engines, "--rounds": rounds, "--save": save})
        _bench_memory(target, run_dir, overrides, shapes, dtypes, threads)
        return
    if _is_function(target):
        from autoprune.bench import ROUNDS, bench_model, example_inputs
        from autoprune.repack import save as write

        _only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        inputs = example_inputs(shapes or (), dtypes or ())
        named = None if engines is None else [name.strip() for name in engines.split(",")]
        found = bench_model(
            _model(target), inputs, threads=threads or 1, engines=named, rounds=rounds or ROUNDS, progress=_console()
        )
        typer.echo(found.text())
        if save is not None:
            write(found.fast, save)
            typer.echo(f"Written: {save}")
        return
    of_functions = {"--input": shapes, "--dtype": dtypes, "--threads": threads, "--engines": engines}
    _only_for("a function", {**of_functions, "--rounds": rounds, "--save": save})
    from autoprune.pipeline.results import results
    from autoprune.report.table import result_table

    typer.echo(result_table(results(_run(Path(target), run_dir, overrides), again=True)))


def _bench_memory(
    target: str,
    run_dir: Path | None,
    overrides: list[str] | None,
    shapes: list[str] | None,
    dtypes: list[str] | None,
    threads: int | None,
) -> None:
    from autoprune.bench import example_inputs, repack_shown
    from autoprune.repack.tuning.layer_memory import layer_memory
    from autoprune.report.bench_tables import memory_table

    if _is_function(target):
        _only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        inputs = example_inputs(shapes or (), dtypes or ())
        fast = repack_shown(_model(target), inputs, threads or 1, _console())
    else:
        _only_for("a function", {"--input": shapes, "--dtype": dtypes, "--threads": threads})
        job = _run(Path(target), run_dir, overrides)
        fast, inputs = job.repacked, job.task.example_inputs(job.config.latency.batch)
    typer.echo(memory_table(layer_memory(fast, inputs)))


@app.command()
def export(
    target: Annotated[
        str,
        typer.Argument(help="A run directory, or package.module:function returning an nn.Module.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.", show_default=False)],
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    engine: Annotated[
        str | None,
        typer.Option(help="onnxruntime or openvino: layers are timed in it, and the file is never slower than dense."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of one inference in the engine.", min=1)] = 1,
    run_code: Annotated[
        bool | None,
        typer.Option("--run-code", help="Of a run directory: call the functions of yours that its config.json names."),
    ] = None,
) -> None:
    """Write the masked model of a run, or any model with zeros in its weights, as an ONNX file.

    Example: autoprune export runs/digits --out digits.onnx

    Example: autoprune export my.models:build --input 1,3,224,224 --out model.onnx --engine onnxruntime
    """
    from autoprune.bench import example_inputs
    from autoprune.pipeline.run import run_in
    from autoprune.repack import export_onnx
    from autoprune.report.bench_tables import export_text

    if _is_function(target):
        _only_for("a run directory", {"--run-code": run_code})
        model, inputs = _model(target), example_inputs(shapes or (), dtypes or ())
    else:
        _only_for("a function", {"--input": shapes, "--dtype": dtypes})
        job = run_in(Path(target), run_code=run_code is True, progress=_console())
        model, inputs = job.masked, job.task.example_inputs(job.config.latency.batch)
    typer.echo(export_text(export_onnx(model, inputs, out, engine=engine, threads=threads)))
    typer.echo(f"Written: {out}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/digits.")]) -> None:
    """Write the report of a finished run again, from what its directory holds, and print it. Runs no code of yours.

    Example: autoprune report runs/digits
    """
    from autoprune.report.stored import write_page

    typer.echo(write_page(run_dir))


@app.command()
def apply(
    model: Annotated[str, typer.Option(help="package.module:function returning the trained nn.Module.")],
    data: Annotated[str, typer.Option(help="package.module:function returning (train_loader, validation_loader).")],
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy's folder, e.g. runs/digits/policy. [default: the one that comes along]"),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="At least this speed-up over dense torch eager.")] = None,
    accuracy_drop: Annotated[float | None, typer.Option(help="At most this drop: 0.01 is a point of accuracy.")] = None,
    out: Annotated[Path, typer.Option(help="Where the pruned, repacked model and the report go.")] = Path(
        "runs/applied"
    ),
    episodes: Annotated[
        int, typer.Option(help="1 takes the policy's plan; more refine it, and never end below it.", min=1)
    ] = 1,
    overrides: Overrides = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Apply a learned policy to your own model: plan, prune, fine-tune, repack, measure.

    Example: autoprune apply --model my.models:build --data my.data:loaders --speedup 3

    Example: autoprune apply --model my.models:build --data my.data:loaders --speedup 3 --episodes 50 --policy runs/mine
    """
    from autoprune.api import apply_config
    from autoprune.config import parse_overrides
    from autoprune.pipeline.results import report_of
    from autoprune.pipeline.run import Run
    from autoprune.report.console import Console
    from autoprune.report.run_report import write_report
    from autoprune.target import Target

    target = Target(speedup=speedup, accuracy_drop=accuracy_drop)
    config = apply_config(policy, model, data, target, episodes, parse_overrides(overrides or []))
    typer.echo(write_report(report_of(Run(config, out, progress=Console(), workers=workers, ray=ray))))
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
    end_forks_with_this()
    try:
        app()
    except AutopruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        what = error.filename or type(error).__name__
        said = f"{what}: {error.strerror or error}. Once that is mended, the same command goes on."
        typer.echo(f"error: {said}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("stopped; give the same command again to go on from here.", err=True)
        raise
