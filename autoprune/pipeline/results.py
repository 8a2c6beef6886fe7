"""The last stage of a run: dense engines, masked and repacked model timed in turns, the table, the report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoprune.agents.base import succeeded
from autoprune.envs.trial import Trial
from autoprune.errors import GivenError, NumericalError
from autoprune.evaluation.measurement import Failure
from autoprune.files import write_tensors
from autoprune.latency.engines import ENGINES, baselines
from autoprune.latency.machine import differences, machine_identity
from autoprune.latency.record import MeasurementRecord
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Latency, Protocol, measure_together, speedup
from autoprune.masks import nonzero_parameters, sparsity, weight_of
from autoprune.model.inventory import KeptDense
from autoprune.pipeline.monitor import point
from autoprune.pipeline.run import Run
from autoprune.repack.rivals import dense_calls
from autoprune.report.data import MeasuredPoint, PlanRow, ResultRow, SearchRow
from autoprune.report.stored import (
    EAGER,
    MASKED,
    REPACKED,
    Front,
    Record,
    Results,
    read_stored,
    row_of,
    write_page,
    write_stored,
)
from autoprune.report.table import markdown_table
from autoprune.report.tensorboard import TrialWriter

ROUNDS = 10  # of the final table that are measured, and kept, together


def results(run: Run, *, again: bool = False) -> tuple[ResultRow, ...]:
    """Measures the final table, or reads it from the directory when it is of this machine and not wanted `again`."""
    path, machine = run.directory / "results.json", machine_identity()
    masked, repacked = run.masked, run.repacked  # what is made anew here takes the results of the old one away
    if path.exists() and not again:
        found = read_stored(Results, path, "the results")
        if not (changed := differences(found.machine, machine)):
            return found.rows
        run.progress.say(f"the results are measured again: {'; '.join(changed)}")
    latency = run.config.latency
    inputs = run.task.example_inputs(latency.batch)
    calls: dict[str, Callable[[], object]] = {EAGER: ENGINES.get("eager")().prepare(run.dense, inputs, latency.threads)}
    engines, left_out = _engine_calls(run, inputs)
    calls |= engines
    calls[MASKED] = lambda: masked(*inputs)
    calls[REPACKED] = lambda: repacked(*inputs)
    run.progress.say(
        f"measuring: batch {latency.batch}, {latency.threads} thread(s), {latency.samples} rounds in turns"
    )
    protocol = Protocol(samples=latency.samples, threads=latency.threads, lead=1)  # each row with its own warm caches
    record = _record_of_rounds(run, list(calls), machine)
    if again:
        record.clear()
    times = _measured(calls, protocol, run, record)

    dense_file = run.directory / "dense.safetensors"
    write_tensors(dense_file, run.dense.state_dict())
    dense_score = _tested(run, run.dense, EAGER)
    size, parameters = dense_file.stat().st_size, sum(p.numel() for p in run.dense.parameters())
    same_work = {EAGER, *(f"dense, {name}" for name in baselines())}
    best = min(same_work & set(times), key=lambda name: times[name].median_ms)

    def row(name: str, label: str, score: float, count: int, size_bytes: int) -> ResultRow:
        took = times[name]
        return ResultRow(label, score, took, speedup(times[EAGER], took), speedup(times[best], took), count, size_bytes)

    rows = [row(EAGER, EAGER, dense_score, parameters, size)]
    for name in times:
        if name not in (EAGER, MASKED, REPACKED):
            label = f"{name}, best engine" if name == best else name
            rows.append(row(name, label, dense_score, parameters, size))
    rows += [ResultRow(name, left_out=why) for name, why in left_out.items()]
    kept = nonzero_parameters(masked)
    packed_size = (run.directory / "repacked.safetensors").stat().st_size
    rows.append(row(MASKED, MASKED, _tested(run, masked, MASKED), kept, size))
    rows.append(row(REPACKED, REPACKED, _tested(run, repacked, REPACKED), kept, packed_size))
    how = {"batch": latency.batch, "threads": latency.threads, "device": "cpu"}
    write_stored(path, Results(tuple(rows), {**how, "rounds, all rows in turns": latency.samples}, machine))
    record.clear()
    return tuple(rows)


def _tested(run: Run, model: nn.Module, row: str) -> float:
    try:
        return run.task.test(model)
    except (GivenError, NumericalError) as error:
        raise type(error)(
            f"the final table has no score for its row {row!r}: {error} All that was made is in the run's directory: "
            "once that is mended, the same command goes on from here."
        ) from error.__cause__ or error


def _record_of_rounds(run: Run, rows: list[str], machine: Mapping[str, Any]) -> MeasurementRecord:
    """What was measured so far of the final table."""
    with (run.directory / "repacked.safetensors").open("rb") as file:
        repacked = hashlib.file_digest(file, "sha256").hexdigest()
    latency = run.config.latency.model_dump(mode="json")
    about = {"rows": rows, "repacked": repacked, "latency": latency, "machine": machine}
    return MeasurementRecord(run.directory / "results.rounds.jsonl", about)


def _measured(
    calls: Mapping[str, Callable[[], object]], protocol: Protocol, run: Run, record: MeasurementRecord
) -> dict[str, Latency]:
    """Times all rows in turns, `ROUNDS` rounds at a time, which are kept: all of them take minutes of a large model."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for first in range(0, protocol.samples, ROUNDS):
        part = replace(protocol, samples=min(ROUNDS, protocol.samples - first))

        def measure(part: Protocol = part) -> dict[str, tuple[float, ...]]:
            return {name: each.samples_ms for name, each in measure_together(calls, part, run.clock).items()}

        for name, values in record(f"from round {first}", measure).items():
            samples[name] += values
    return {name: Latency.from_samples(values, protocol.threads) for name, values in samples.items()}


def _engine_calls(run: Run, inputs: tuple[Any, ...]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The dense engines that were asked for and compute the model; the others, and why they are left out."""
    names = [name for name in run.config.latency.engines or baselines() if name != "eager"]
    calls, left_out = dense_calls(run.dense, inputs, run.config.latency.threads, names)
    for name, why in left_out.items():
        run.progress.say(f"dense engine {name} left out: {why}")
    told = {f"dense, {name}": why for name, why in left_out.items()}
    return {f"dense, {name}": call for name, call in calls.items()}, told


def latency_text(table: LatencyTable) -> str:
    """The latency table for reading: a row a layer and pattern, microseconds a call at each measured sparsity."""
    rows, sparsities = [], []
    for name, layer in table.layers.items():
        for pattern, curve in layer.curves.items():
            sparsities = [f"{100 * point.sparsity:.0f}%" for point in curve]
            cells = [f"{point.latency_us:.1f} {point.backend}" for point in curve]
            rows.append([name, pattern, f"{layer.dense_us:.1f}", *cells])
    return markdown_table(("layer", "pattern", "torch dense us", *sparsities), rows, left=2)


def write_report(run: Run) -> str:
    """Writes ``report.json``, and from it ``report.md`` and its figures, and returns the page."""
    rows = results(run)
    write_stored(run.directory / "report.json", _record(run))
    _write_hparams(run, rows)
    return write_page(run.directory)


def _record(run: Run) -> Record:
    searched = _searched(run)
    return Record(
        title=f"{run.task.name}: {run.config.target.text(run.task.metric)}",
        facts={key: str(value) for key, value in _facts(run).items()},
        target=run.config.target,
        metric=run.task.metric,
        plan=_plan_rows(run),
        kept_dense=_kept_dense(run),
        searches=_search_rows(run),
        sparsities=_shares(run),
        front=_front(run) if searched else None,
        rewards={run.config.search.agent.name: tuple(trial.reward for trial in succeeded(run.found.trials))}
        if searched
        else None,
    )


def _facts(run: Run) -> dict[str, Any]:
    config, halving = run.config, run.config.search.halving
    facts = {
        "task": config.task,
        "target": config.target.text(run.task.metric),
        **(
            {
                "agent": config.search.agent,
                "episodes": config.search.episodes,
                "actions": ", ".join(map(str, config.env.actions)),
                "recovery before scoring": config.env.recovery,
                "successive halving": f"{halving.plans} plans from {halving.steps} steps on" if halving else "none",
            }
            if _searched(run)
            else {"plan": "given, not searched for"}
        ),
        "training": run.plan.training,
        "fine-tuning epochs": config.finetune.settings.epochs,
        "settings of the plan": dict(run.plan.settings) or "none",
        "seed": config.seed,
    }
    if _searched(run) and run.uniform["uniform"] is None:
        facts["uniform, same speed-up"] = "no uniform plan was measured to be as fast as the agent's"
    if _searched(run) and (
        failed := [trial.evaluated.reason for trial in run.found.trials if isinstance(trial.evaluated, Failure)]
    ):
        facts["failed trials"] = f"{len(failed)} of {len(run.found.trials)}; the first: {failed[0]}"
    if run.task.testing is run.task.validation:
        facts["test split"] = "none was given: the figures are of the validation split that the search saw"
    return facts


def _searched(run: Run) -> bool:
    """Whether the plan was searched for here, and not given."""
    return (run.directory / "search" / "trials.jsonl").exists()


def _plan_rows(run: Run) -> tuple[PlanRow, ...]:
    rows = []
    lowered, shares = {row.name: row for row in run.repacked.report}, _shares(run)
    for name, layer in run.plan.layers.items():
        made = lowered[name]
        rows.append(
            PlanRow(
                layer=name,
                weights=run.inventory[name].weights,
                sparsity=shares[name],
                pattern=str(layer.pattern),
                criterion=str(layer.criterion),
                backend=made.backend,
                dense_us=made.dense_us,
                latency_us=made.packed_us if made.backend != "dense" else made.dense_us,
            )
        )
    return tuple(rows)


def _shares(run: Run) -> dict[str, float]:
    """Zeros of each planned layer in the end: the plan's, or where the method found the layers' shares, its own."""
    return {name: sparsity(weight_of(run.masked, name)) for name in run.plan.layers}


def _kept_dense(run: Run) -> tuple[KeptDense, ...]:
    """Layers that were never offered, and planned ones that no backend makes faster."""
    lost = [
        KeptDense(row.name, row.kind, row.why)
        for row in run.repacked.report
        if row.backend == "dense" and row.name in run.plan.layers
    ]
    offered = run.offered if _searched(run) or run.config.target.speedup is not None else run.inventory
    return (*offered.dense, *lost)


def _search_rows(run: Run) -> tuple[SearchRow, ...]:
    if not _searched(run):
        return ()
    compared = run.uniform

    def row(agent: str, episodes: int, trial: Mapping[str, Any]) -> SearchRow:
        return SearchRow(agent, episodes, trial["reward"], trial["score"], trial["latency_ms"], trial["speedup"])

    rows = [row(str(run.config.search.agent.name), len(run.found.trials), compared["agent"])]
    if compared["uniform"] is not None:
        rows.append(row("uniform, same speed-up", math.prod(_grid_sizes(run)), compared["uniform"]))
    return tuple(rows)


def _grid_sizes(run: Run) -> list[int]:
    return [len(component.anchors()) for component in run.env.actions.components]


def _front(run: Run) -> Front:
    uniform = run.uniform["uniform"]
    return Front(
        trials=tuple(point(trial.measurement) for trial in succeeded(run.found.trials)),
        best=point(run.found.best.measurement),
        dense=MeasuredPoint(run.table.dense_ms, run.dense_score),
        uniform=point(Trial.from_json(uniform).measurement) if uniform else None,
    )


def _write_hparams(run: Run, rows: tuple[ResultRow, ...]) -> None:
    fast, metric = row_of(rows, REPACKED), run.task.metric
    flat = {
        "agent": str(run.config.search.agent),
        "episodes": run.config.search.episodes,
        "target": run.config.target.text(run.task.metric),
        "recovery": str(run.config.env.recovery),
        "training": str(run.plan.training),
        "learning_rate": run.config.finetune.settings.learning_rate,
        "seed": run.config.seed,
    }
    with TrialWriter(run.directory / "tensorboard" / "final") as writer:
        writer.hparams(flat, {metric.tag: metric.figure(fast.score or 0.0), "speedup": fast.speedup or 0.0})
