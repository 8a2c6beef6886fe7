"""Profiling: every layer, pattern and anchor sparsity timed with the real kernels, and whole models end to end."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.criteria import LayerStatistics
from autoprune.criteria.magnitude import Magnitude
from autoprune.errors import AutopruneError, FileError
from autoprune.evaluation.devices import Device
from autoprune.evaluation.devices.process import HERE
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.files import cache_folder, check_cache
from autoprune.identity.fingerprint import architecture_fingerprint
from autoprune.latency.record import MeasurementRecord
from autoprune.latency.table import TABLE_VERSION, LatencyTable, LayerTable, Point
from autoprune.latency.timer import Clock, Protocol, measure_together, torch_threads
from autoprune.masks import saliency_of
from autoprune.model.copies import copy_for_inference
from autoprune.model.inventory import record_inputs
from autoprune.model.weights import layer_at, weight_of
from autoprune.patterns import PATTERNS
from autoprune.patterns.layered import mask_of
from autoprune.plan import LayerPlan, LayerSpec, Plan, curve_of
from autoprune.precision import choices_of_layers
from autoprune.processes.locks import turn
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.repack import Graph, ProgramModel, is_replaceable, lower_layer, repack
from autoprune.repack.tuning.layer_times import LayerTime
from autoprune.repack.tuning.tuning import VERSION

TABLE = "latency"  # what a latency table's file in the cache is called, before what it holds for
ANCHORS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
WHOLE_ANCHORS = (0.0, 0.5, 0.8, 0.95)  # uniform models timed end to end, to join the layers' times to the model's


def profile_settings(subject: Subject, patterns: Sequence[Choice], batch: int, threads: int) -> dict[str, Any]:
    """What a latency table holds for, besides the machine: a table made for other settings is stale."""
    return {
        "batch": batch,
        "threads": threads,
        "precision": subject.precision,
        "patterns": [str(pattern) for pattern in patterns],
        "architecture": architecture_fingerprint(subject.dense),  # the same layers may have other work between them
        "layers": {
            layer.name: list(layer.weight_shape) + list(layer.input_shape) for layer in subject.inventory.layers
        },
    }


def profile_record(
    table: Path, settings: Mapping[str, Any], protocol: Protocol, device: Device = HERE
) -> MeasurementRecord:
    """What was measured so far of the table of a file: it is kept beside that until the table is there."""
    about = {"settings": settings, "machine": device.identity(), "samples": protocol.samples}
    return MeasurementRecord(table.with_name(f"{table.stem}.cells.jsonl"), about)


def shared_file(what: str, settings: Mapping[str, Any], protocol: Protocol, device: Device = HERE) -> Path:
    """The file, in this user's cache, of what was measured with these settings on this device in so many rounds.

    Raises:
        FileError: there is no place for a cache, or it cannot be written.
    """
    check_cache()
    versions = {"kernels": VERSION, "table": TABLE_VERSION}
    about = {"settings": settings, "machine": device.identity(), "samples": protocol.samples, **versions}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{what}-{digest}.json"


def shared_or_measured(
    settings: Mapping[str, Any],
    protocol: Protocol,
    measure: Callable[[], LatencyTable],
    say: Callable[[str], None],
    *,
    fresh: bool = False,
    device: Device = HERE,
) -> LatencyTable:
    """This user's table, which all targets and run directories share, measured now if there is none.

    Args:
        settings: what it holds for.
        protocol: of one cell.
        measure: called once, while others who need the same table wait.
        say: is told where the table is from, or why it is not kept.
        fresh: measure it even if there is one.
        device: that measures.

    Raises:
        FileError: the file is corrupt.
        StaleTable: what the file holds was measured elsewhere.
    """
    try:
        path = shared_file(TABLE, settings, protocol, device)
    except FileError as error:
        say(f"the latency table is not kept for other runs: {error}")
        return measure()
    with turn(path, say):
        if path.exists() and not fresh:
            say(f"latency table: measured before ({path})")
            return LatencyTable.load(path, settings=settings, machine=device.identity())
        table = measure()
        table.save(path)
        return table


def profile_table(
    subject: Subject,
    patterns: Sequence[Choice],
    settings: Mapping[str, Any],
    protocol: Protocol,
    clock: Clock,
    progress: Progress = SILENT,
    record: MeasurementRecord | None = None,
    device: Device = HERE,
) -> LatencyTable:
    """Measures the whole table, or what the record does not hold of it.

    Args:
        subject: the model and its prunable layers.
        patterns: what a plan may hold; the last is the default one, used for the whole models. In a run whose precision
            is ``planned`` each has a curve in float32 and one in int8.
        settings: `profile_settings`, kept with the table.
        protocol: of one cell.
        clock: seconds.
        progress: shows a bar over the layers.
        record: keeps every measurement; None: in memory alone.
        device: that measures.

    Raises:
        AutopruneError: layers stand outside of a program, and the precision or the device is for programs alone.
    """
    record = MeasurementRecord() if record is None else record
    if record.known:
        progress.say(f"latency table: {record.known} of its measurements were made before")
    inputs = subject.task.example_inputs(int(settings["batch"]))
    layers = _in_programs(subject, patterns, int(settings["batch"]), protocol, clock, progress, record, device)
    if layers is None:
        if subject.precision != "float32" or not device.runs_torch:
            what, instead = f"precision {subject.precision!r}", "take precision = 'float32'"
            if not device.runs_torch:
                what, instead = f"a model for {device}", "measure it on this machine"
            raise AutopruneError(
                f"{what} cannot be profiled: layers that can be pruned are not in a program of this model. Name them "
                f"in env.keep_dense, or {instead}."
            )
        layers = _one_by_one(subject, patterns, inputs, protocol, clock, progress, record)
    return _joined(subject, layers, patterns[-1], settings, protocol, clock, record, device)


def _in_programs(
    subject: Subject,
    patterns: Sequence[Choice],
    batch: int,
    protocol: Protocol,
    clock: Clock,
    progress: Progress,
    record: MeasurementRecord,
    device: Device,
) -> dict[str, LayerTable] | None:
    """Times layers where they run: inside whole programs, all layers at one sparsity, one program a sparsity.

    On its own a packed layer is mostly the call from Python, so that small layers look as dear as large ones, and a
    recurrent weight does one step there, in a program all of them. A layer that cannot be int8 has the figures of
    float32 there, too. None where the model is no program.
    """
    specs = subject.inventory.layers
    graph, inputs = subject.graph(batch), subject.task.example_inputs(batch)
    if graph is None:
        return None
    precisions = choices_of_layers(subject.precision)
    cells: dict[tuple[str, float], dict[str, _Cell]] = {}  # of a curve, at a sparsity
    count = len(precisions) * (1 + len(patterns) * len(ANCHORS))
    with progress.bar("latency table", count) as bar, torch_threads(protocol.threads):
        for precision, choice, sparsity in itertools.product(precisions, patterns, (0.0, *ANCHORS)):
            layer = LayerPlan(sparsity, choice, precision=precision)
            if sparsity == 0.0 and choice != patterns[0]:  # nothing masked is the same under any pattern
                cells[layer.curve, 0.0] = cells[curve_of(patterns[0], precision), 0.0]
                continue
            measure = partial(_program_times, subject, graph, layer, inputs, protocol, clock, device)
            now = _cells(record(f"{layer.curve} at {sparsity}", measure))
            bar.advance()
            if now is None:
                return None
            cells[layer.curve, sparsity] = {**cells.get((str(choice), sparsity), {}), **now}
    whole = cells[str(patterns[0]), 0.0]
    curves = dict.fromkeys(curve for curve, _ in cells)
    return {
        spec.name: LayerTable(
            whole[spec.name].dense_us or whole[spec.name].latency_us,
            whole[spec.name].calls,
            {key: tuple(cells[key, s][spec.name].point(s) for s in (0.0, *ANCHORS)) for key in curves},
        )
        for spec in specs
    }


@dataclass(frozen=True)
class _Cell:
    """One layer under one pattern at one sparsity, as kept: torch's dense time, and ours by the fastest backend.

    Both are of one call of so many in an inference.
    """

    dense_us: float | None
    latency_us: float
    backend: str
    calls: int

    def point(self, sparsity: float) -> Point:
        return Point(sparsity, self.latency_us, self.backend)


def _cells(kept: Mapping[str, Mapping[str, Any]] | None) -> dict[str, _Cell] | None:
    return None if kept is None else {name: _Cell(**cell) for name, cell in kept.items()}


def _program_times(
    subject: Subject,
    graph: Graph,
    layer: LayerPlan,
    inputs: tuple[Tensor, ...],
    protocol: Protocol,
    clock: Clock,
    device: Device,
) -> dict[str, dict[str, Any]] | None:
    """A `_Cell` of every layer, of one call, all planned alike; None where the program does not hold them all.

    A layer that cannot be int8 has none, where that is planned.
    """
    model = copy.deepcopy(subject.dense)
    if layer.sparsity > 0.0:
        for spec in subject.inventory.layers:
            _mask_(weight_of(model, spec.name), spec, layer.pattern, layer.sparsity)
    precision = Plan(dict.fromkeys(subject.inventory.names, layer)).precision_in(subject.precision)
    calibration = subject.task.calibration_inputs(precision)
    fast = repack(model, inputs, precision=precision, calibration=calibration, graph=graph, clock=clock)
    if not isinstance(fast, ProgramModel):
        return None
    rows: dict[str, list[LayerTime]] = {}
    for row in device.layer_times(fast, model, inputs, replace(protocol, threads=1), clock):
        rows.setdefault(row.name, []).append(row)
    if any(spec.name not in rows for spec in subject.inventory.layers):
        return None
    if layer.precision == "int8":
        in_bytes = {row.name for row in fast.report if row.precision == "int8"}
        rows = {name: of for name, of in rows.items() if name in in_bytes}
    return {
        name: asdict(_Cell(of[0].dense_us, statistics.fmean(each.median_us for each in of), of[0].backend, len(of)))
        for name, of in rows.items()
    }


def _mask_(weight: Tensor, spec: LayerSpec, pattern: Choice, sparsity: float) -> None:
    saliency = saliency_of(Magnitude(), spec, weight, LayerStatistics())
    with torch.no_grad():
        weight.mul_(mask_of(PATTERNS.create(pattern), spec, saliency, sparsity))


def _one_by_one(
    subject: Subject,
    patterns: Sequence[Choice],
    inputs: tuple[Tensor, ...],
    protocol: Protocol,
    clock: Clock,
    progress: Progress,
    record: MeasurementRecord,
) -> dict[str, LayerTable]:
    """Times every layer as a module of its own, with each backend."""
    recorded = record_inputs(copy_for_inference(subject.dense), inputs, subject.inventory.names)
    layers = {}
    with progress.bar("latency table", len(subject.inventory.layers)) as bar, torch_threads(protocol.threads):
        for spec in subject.inventory.layers:
            module = layer_at(subject.dense, spec.name, spec.turned)
            packs = is_replaceable(subject.dense, spec.name)
            layers[spec.name] = _layer(module, recorded[spec.name], patterns, spec, packs, protocol, clock, record)
            bar.advance()
    return layers


def _layer(
    module: nn.Module,
    x: Tensor,
    patterns: Sequence[Choice],
    spec: LayerSpec,
    packs: bool,
    protocol: Protocol,
    clock: Clock,
    record: MeasurementRecord,
) -> LayerTable:
    """Times one layer; by torch alone unless it `packs` outside of a program."""
    dense = {"dense": module}

    def fastest(choice: Choice, sparsity: float) -> dict[str, Any]:
        masked = copy.deepcopy(module)
        if sparsity > 0.0 and packs:
            _mask_(weight_of(masked, ""), spec, choice, sparsity)
        timed = {name: _call(option, x) for name, option in (lower_layer(masked) if packs else dense).items()}
        times = measure_together(timed, protocol, clock)
        best = min(times, key=lambda name: times[name].median_ms)
        return asdict(_Cell(times["dense"].median_ms * 1e3, times[best].median_ms * 1e3, best, spec.calls))

    def cell(choice: Choice, sparsity: float) -> _Cell:
        return _Cell(**record(f"{spec.name}: {choice} at {sparsity}", partial(fastest, choice, sparsity)))

    whole = cell(patterns[0], 0.0)  # nothing masked is the same under any pattern
    cells = {str(choice): [whole, *(cell(choice, anchor) for anchor in ANCHORS)] for choice in patterns}
    measured = [whole, *(each for curve in cells.values() for each in curve[1:])]
    return LayerTable(
        statistics.median(each.dense_us for each in measured if each.dense_us is not None),
        spec.calls,
        {
            key: tuple(each.point(sparsity) for each, sparsity in zip(curve, (0.0, *ANCHORS), strict=True))
            for key, curve in cells.items()
        },
    )


def _call(module: nn.Module, x: Tensor) -> Any:
    return lambda: module(x)


def _joined(
    subject: Subject,
    layers: Mapping[str, LayerTable],
    pattern: Choice,
    settings: Mapping[str, Any],
    protocol: Protocol,
    clock: Clock,
    record: MeasurementRecord,
    device: Device,
) -> LatencyTable:
    """Measures uniform models end to end, and joins the layers' times to the models'."""
    unit = LatencyTable(layers, 1.0, ((1.0, 1.0),), settings, device.identity())
    evaluator = Evaluator(subject, unit, NoRecovery(), protocol, int(settings["batch"]), clock=clock, device=device)

    def timed(plan: Plan) -> list[float]:
        return [each.median_ms for each in evaluator.time(evaluator.repacked(evaluator.masked_model(plan), plan))]

    sums, whole, dense = [], [], []
    for precision, sparsity in itertools.product(choices_of_layers(subject.precision), WHOLE_ANCHORS):
        plan = Plan(dict.fromkeys(layers, LayerPlan(sparsity, pattern, precision=precision)))
        which = "" if precision == "float32" else f" in {precision}"
        dense_ms, packed_ms = record(f"whole{which} at {sparsity}", partial(timed, plan))
        sums.append(unit.sum_ms(plan))
        whole.append(packed_ms)
        dense.append(dense_ms)
    dense_ms = statistics.median(dense)
    # Each model was timed in turns with the dense one: in units of it, drift of the machine cancels.
    points = zip(sums, [w / d * dense_ms for w, d in zip(whole, dense, strict=True)], strict=True)
    return LatencyTable(layers, dense_ms, rising(list(points)), settings, device.identity())


def rising(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points (parts, whole) as a strictly rising line: what falls or stands still, or nearly so, is averaged.

    Pool adjacent violators (Ayer et al. 1955): noise must not make a model that does more look faster.
    """
    pools: list[tuple[float, float, int]] = []
    for x, y in sorted(points):
        pools.append((x, y, 1))
        while len(pools) > 1 and not (pools[-1][0] > pools[-2][0] and pools[-1][1] > pools[-2][1]):
            (x1, y1, n1), (x2, y2, n2) = pools[-2:]
            pools[-2:] = [((x1 * n1 + x2 * n2) / (n1 + n2), (y1 * n1 + y2 * n2) / (n1 + n2), n1 + n2)]
    return tuple((x, y) for x, y, _ in pools)
