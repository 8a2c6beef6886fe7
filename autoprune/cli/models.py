"""Commands about fast inference, of a run or of any model: repack, bench, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli.options import (
    Calibration,
    ConfigOrFunction,
    Dtypes,
    Overrides,
    Precision,
    RunDir,
    Save,
    Shapes,
    Threads,
    ValueBits,
    console,
    in_precision,
    is_function,
    model_of,
    only_for,
    open_run,
)
from autoprune.cli.registries import completed_list
from autoprune.errors import ConfigError

if TYPE_CHECKING:  # imported when a command runs: --help does not wait for torch
    from torch import Tensor, nn

    from autoprune.precision import Precision as PrecisionName


def repack(
    target: ConfigOrFunction,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    save: Save = None,
    value_bits: ValueBits = None,
    precision: Precision = None,
    calibration: Calibration = None,
) -> None:
    """Repack the masked model of a run, or any model with zeros in its weights, into smaller dense work.

    Example: autoprune repack configs/digits.toml

    Example: autoprune repack my.models:build --input 1,3,224,224 --save fast.safetensors --value-bits 8

    Example: autoprune repack my.models:build --input 1,8 --save f.safetensors --precision int8 --calibration my:batches
    """
    from autoprune.bench import repack_shown
    from autoprune.repack import save as write
    from autoprune.repack.weights.serialized import check_value_bits
    from autoprune.report.bench_tables import repack_text

    if is_function(target):
        only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        if save is None:
            raise ConfigError("say where the repacked model goes: --save fast.safetensors.")
        check_value_bits(value_bits or 32)
        given = _given(target, shapes, dtypes, precision, calibration)
        fast = repack_shown(given.model, given.inputs, threads or 1, console(), given.precision, given.calibration)
        write(fast, save, value_bits=value_bits or 32)
        typer.echo(repack_text(fast))
        typer.echo(f"Written: {save}")
        return
    of_functions = {"--input": shapes, "--dtype": dtypes, "--threads": threads}
    only_for("a function", {**of_functions, "--save": save, "--value-bits": value_bits, "--calibration": calibration})
    job = open_run(Path(target), run_dir, [*in_precision(precision), *(overrides or [])])
    typer.echo(repack_text(job.repacked))
    typer.echo(f"Written: {job.directory / 'repacked.safetensors'}")


def shrink(
    target: ConfigOrFunction,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    save: Annotated[Path | None, typer.Option(help="Where the state dict of a function's model is written.")] = None,
) -> None:
    """Cut dead channels out of the masked model of a run, or any model with zeros in its weights: smaller, plain torch.

    Example: autoprune shrink configs/digits.toml

    Example: autoprune shrink my.models:build --input 1,3,224,224 --save small.safetensors
    """
    from autoprune.bench import example_inputs
    from autoprune.files import given_path, write_tensors
    from autoprune.pipeline.application import SHRUNK
    from autoprune.repack import shrink as shrunk
    from autoprune.report.bench_tables import shrunk_text

    if is_function(target):
        only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        if save is None:
            raise ConfigError("say where the smaller model goes: --save small.safetensors.")
        written, small = given_path(save), shrunk(model_of(target), example_inputs(shapes or (), dtypes or ()))
    else:
        only_for("a function", {"--input": shapes, "--dtype": dtypes, "--save": save})
        job = open_run(Path(target), run_dir, overrides)
        written = job.directory / SHRUNK
        small = shrunk(job.masked, job.task.example_inputs(job.config.latency.batch))
    write_tensors(written, small.model.state_dict())
    typer.echo(shrunk_text(small))
    typer.echo(f"Written: {written}")


# long: a parameter is an option, with what --help says of it
def bench(
    target: ConfigOrFunction,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    engines: Annotated[
        str | None,
        typer.Option(
            help="Dense engines to compare with, e.g. channels_last,onnxruntime. [default: all there are]",
            autocompletion=completed_list("engines"),
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Instead: what packed layers take in a file and fetch in an inference.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="How often every form of a function's model is timed. [default: 20]", min=1)
    ] = None,
    save: Save = None,
    precision: Precision = None,
    calibration: Calibration = None,
) -> None:
    """Measure: the final table of a run again, or any model as it stands against every dense engine, layer by layer.

    Example: autoprune bench configs/digits.toml

    Example: autoprune bench my.models:build --input 1,3,224,224 --engines channels_last,onnxruntime --threads 2

    Example: autoprune bench my.models:encoder --input 1,128 --dtype int64 --save fast.safetensors

    Example: autoprune bench my.models:build --input 1,3,224,224 --precision int8 --calibration images.npy

    Example: autoprune bench my.models:build --input 1,3,224,224 --memory
    """
    if memory:
        only_for("bench without --memory", {"--engines": engines, "--rounds": rounds, "--save": save})
        only_for("bench without --memory", {"--precision": precision, "--calibration": calibration})
        _bench_memory(target, run_dir, overrides, shapes, dtypes, threads)
        return
    if is_function(target):
        from autoprune.bench import ROUNDS, bench_model
        from autoprune.repack import save as write

        only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        given = _given(target, shapes, dtypes, precision, calibration)
        named = None if engines is None else [name.strip() for name in engines.split(",")]
        found = bench_model(
            given.model, given.inputs, threads=threads or 1, engines=named, rounds=rounds or ROUNDS,
            precision=given.precision, calibration=given.calibration, progress=console(),
        )  # fmt: skip
        typer.echo(found.text())
        if save is not None:
            write(found.fast, save)
            typer.echo(f"Written: {save}")
        return
    of_functions = {"--input": shapes, "--dtype": dtypes, "--threads": threads, "--engines": engines}
    only_for("a function", {**of_functions, "--rounds": rounds, "--save": save, "--calibration": calibration})
    from autoprune.pipeline.results import results
    from autoprune.report.table import result_table

    changed = [*in_precision(precision), *(overrides or [])]
    typer.echo(result_table(results(open_run(Path(target), run_dir, changed), again=True)))


@dataclass(frozen=True)
class _Given:
    """A function's model and what it is repacked with."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    precision: PrecisionName
    calibration: list[tuple[Tensor, ...]] | None


def _given(
    target: str, shapes: list[str] | None, dtypes: list[str] | None, precision: str | None, calibration: str | None
) -> _Given:
    """Reads the arguments about a function's model.

    The first samples of calibration data are the example inputs: what bytes lose is told on data as the model sees it.
    """
    from autoprune.bench import example_inputs
    from autoprune.calibration import calibration_batches
    from autoprune.errors import did_you_mean
    from autoprune.model.arguments import Arguments
    from autoprune.precision import PRECISIONS
    from autoprune.tasks.batches import in_pieces

    named = next((each for each in PRECISIONS if each == (precision or "float32")), None)
    if named is None:
        raise ConfigError(f"--precision: {did_you_mean(str(precision), PRECISIONS)}")
    if named in ("float32", "bf16"):
        only_for("--precision int8 or mixed", {"--calibration": calibration})
    elif calibration is None:
        raise ConfigError(
            f"--precision {named} needs --calibration: package.module:function that yields batches of the model's "
            "inputs, or a file of them, .npy or .safetensors; four batches of 32 are plenty."
        )
    inputs, model = example_inputs(shapes or (), dtypes or ()), model_of(target)
    if calibration is None:
        return _Given(model, inputs, named, None)
    batches = calibration_batches(calibration, model, inputs)
    alike = in_pieces(batches, Arguments(*inputs).samples)
    return _Given(model, alike[0] if alike else inputs, named, batches)


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

    if is_function(target):
        only_for("a config", {"--run-dir": run_dir, "--set": overrides})
        inputs = example_inputs(shapes or (), dtypes or ())
        fast = repack_shown(model_of(target), inputs, threads or 1, console())
    else:
        only_for("a function", {"--input": shapes, "--dtype": dtypes, "--threads": threads})
        job = open_run(Path(target), run_dir, overrides)
        fast, inputs = job.repacked, job.task.example_inputs(job.config.latency.batch)
    typer.echo(memory_table(layer_memory(fast, inputs)))


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

    if is_function(target):
        only_for("a run directory", {"--run-code": run_code})
        model, inputs = model_of(target), example_inputs(shapes or (), dtypes or ())
    else:
        only_for("a function", {"--input": shapes, "--dtype": dtypes})
        job = run_in(Path(target), run_code=run_code is True, progress=console())
        model, inputs = job.masked, job.task.example_inputs(job.config.latency.batch)
    typer.echo(export_text(export_onnx(model, inputs, out, engine=engine, threads=threads)))
    typer.echo(f"Written: {out}")
