"""A model as it stands: repacked, timed in turns with every dense engine, and looked at an operation at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, ConfigError, MissingExtra, did_you_mean
from autoprune.latency.engines import ENGINES
from autoprune.latency.engines.base import Call
from autoprune.latency.timer import Clock, Protocol, measure_together
from autoprune.model.arguments import Arguments
from autoprune.model.copies import copy_for_inference, uncompiled_
from autoprune.model.weights import weighted_layers
from autoprune.precision import Precision
from autoprune.progress import SILENT, Progress
from autoprune.repack import ProgramModel, RepackedModel, repack
from autoprune.repack.probes import fresh
from autoprune.repack.rivals import dense_calls, signal_to_noise_db
from autoprune.repack.tuning.layer_times import LayerTime, layer_times
from autoprune.repack.tuning.roofline import bf16_gflops, fma_gflops, int8_gops, int8_instruction
from autoprune.report.bench_tables import EAGER, REPACKED, Bench, Peak
from autoprune.tasks.batches import in_pieces

DTYPES = {"float32": torch.float32, "int64": torch.int64}
ROUNDS, WARMUP, MIN_SAMPLE_MS = 20, 2, 2.0


def parse_shape(text: str, option: str = "--input") -> tuple[int, ...]:
    """``1,3,224,224`` -> its numbers; raises ConfigError, which names the option, when it is no shape."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{option} {text!r} is no shape: give positive whole numbers with commas between them, batch first, "
            "such as 1,3,224,224."
        )
    return tuple(int(part) for part in parts)


def example_inputs(shapes: Sequence[str], dtypes: Sequence[str], seed: int = 0) -> tuple[Tensor, ...]:
    """Tensors to call a model with: normal float32, or int64 of 0 and 1, which any table of words has.

    Args:
        shapes: a text an input, see `parse_shape`.
        dtypes: keys of DTYPES: one for all inputs, or one each; float32 when there is none.
        seed: of the numbers.

    Raises:
        ConfigError: a text that is no shape, an unknown type, or another number of types than of inputs.
    """
    if not shapes:
        raise ConfigError("say what the model is called with: --input 1,3,224,224, once for each input.")
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"unknown --dtype {name!r}. {did_you_mean(name, DTYPES)}")
    named = list(dtypes) or ["float32"]
    if len(named) not in (1, len(shapes)):
        raise ConfigError(f"{len(named)} --dtype for {len(shapes)} --input: give one for all, or one for each.")
    named = named * len(shapes) if len(named) == 1 else named
    generator = torch.Generator().manual_seed(seed)

    def made(shape: tuple[int, ...], name: str) -> Tensor:
        if name == "int64":
            return torch.randint(2, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    return tuple(made(parse_shape(text), name) for text, name in zip(shapes, named, strict=True))


def repack_shown(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    threads: int,
    progress: Progress,
    precision: Precision = "float32",
    calibration: Sequence[tuple[Tensor, ...]] | None = None,
) -> RepackedModel:
    """`repack` with a progress bar.

    Raises:
        AutopruneError: the model does not run on these inputs, or cannot be reproduced.
    """
    copied = uncompiled_(copy_for_inference(model))
    try:
        with torch.inference_mode():
            copied(*fresh(inputs))
    except Exception as error:  # the model is the user's: it may raise anything
        shapes = " and ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise AutopruneError(
            f"the model does not run on {shapes}: {lines[0].rstrip('.')}. "
            "Give --input (batch first) and --dtype as it is called."
        ) from error
    steps = 1 + len(weighted_layers(model))
    with progress.bar("repacking", steps) as bar:
        told = 0

        def tell(note: str) -> None:
            nonlocal told
            told += 1
            bar.advance(1 if told < steps else 0, note)

        fast = repack(model, inputs, threads=threads, precision=precision, calibration=calibration, progress=tell)
        bar.advance(max(0, steps - told))
    return fast


def bench_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    threads: int = 1,
    engines: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    precision: Precision = "float32",
    calibration: Sequence[tuple[Tensor, ...]] | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = SILENT,
) -> Bench:
    """Repacks a model and times it in turns with the dense engines, then an operation at a time.

    Args:
        model: any module, zeros in its weights or not; left as it is.
        inputs: as it is called, at the batch size that matters.
        threads: of one inference of the whole model; operations are timed on one.
        engines: rows of ENGINES besides the model itself (``eager``); None: every one that is installed and can run it.
        rounds: every form is timed once a round.
        precision: of the repacked model; see `repack`.
        calibration: batches of inputs, for it and for the engines in int8.
        clock: seconds.
        progress: where long work is shown.

    Raises:
        AutopruneError: the model does not run, or an engine that was asked for cannot be had.
    """
    for name in engines or ():
        if command := ENGINES.get(name)().available():
            raise MissingExtra(f"the engine {name} is not installed here. Install it with: {command}")
    model = uncompiled_(copy_for_inference(model))
    fast = repack_shown(model, inputs, threads, progress, precision, calibration)
    names = [name for name in dict.fromkeys(ENGINES if engines is None else engines) if name != EAGER]
    with progress.bar("preparing engines", len(names)) as bar:
        pieces = in_pieces(calibration or (), Arguments(*inputs).samples) or None
        rivals, left_out = dense_calls(model, inputs, threads, names, lambda name: bar.advance(1, name), pieces)
    itself = ENGINES.get(EAGER)().prepare(model, inputs, threads)
    calls: dict[str, Call] = {EAGER: itself, **rivals, REPACKED: lambda: fast(*inputs)}
    rounded = [name for name in rivals if ENGINES.get(name).precision != "float32"]
    rounded += [REPACKED] if precision != "float32" else []
    wanted = itself()
    snr_db = {name: signal_to_noise_db(calls[name](), wanted) for name in rounded}
    protocol = Protocol(rounds, WARMUP, threads, MIN_SAMPLE_MS, lead=1)
    with progress.bar("whole model", rounds) as bar:
        latencies = measure_together(calls, protocol, clock, lambda: bar.advance(1))
    layers: tuple[LayerTime, ...] = ()
    if isinstance(fast, ProgramModel):
        with progress.bar("a layer at a time", rounds) as bar:
            layers = layer_times(fast, model, inputs, protocol, clock, lambda: bar.advance(1))
    return Bench(fast, latencies, left_out, layers, _peak(precision) if layers else None, precision, snr_db)


def _peak(precision: Precision) -> Peak:
    """What a core reaches at most in the products of this precision, where it has an instruction for them."""
    if precision == "bf16":  # layers are in bf16 or float32, whichever is faster
        return max(Peak("FMA", fma_gflops()), Peak("bf16", bf16_gflops() or 0.0), key=lambda peak: peak.gflops)
    in_bytes = None if precision == "float32" else int8_gops()
    return Peak("FMA", fma_gflops()) if in_bytes is None else Peak(f"int8 {int8_instruction()}", in_bytes)
