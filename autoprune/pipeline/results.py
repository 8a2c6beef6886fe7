"""The last stages of a run: dense engines, masked and repacked model timed interleaved, and what the report says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoprune.agents.base import succeeded
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.errors import GivenError, NumericalError
from autoprune.evaluation.devices import Candidate
from autoprune.evaluation.measurement import Failure
from autoprune.files import read_json, write_tensors
from autoprune.latency.engines import baselines as compared_engines
from autoprune.latency.machine import differences
from autoprune.latency.record import MeasurementRecord
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Latency, Protocol, speedup
from autoprune.masks import nonzero_parameters, sparsity
from autoprune.model.inventory import KeptDense
from autoprune.model.weights import weight_of
from autoprune.pipeline.application import FineTuned, Repacked
from autoprune.pipeline.contest import best_by_source, read_contenders, winner
from autoprune.pipeline.forms import Form, forms_of
from autoprune.pipeline.monitor import point
from autoprune.pipeline.preparation import Context, Prepared
from autoprune.pipeline.run import CORRECTED, Run
from autoprune.plan import LayerPlan
from autoprune.repack import LayerReport
from autoprune.report.data import ContenderRow, MeasuredPoint, PlanRow, ResultRow, SearchRow
from autoprune.report.run_report import RunReport
from autoprune.report.stored import (
    CALLED,
    EAGER,
    MASKED,
    REPACKED,
    WHOLE,
    Front,
    Record,
    Results,
    read_stored,
    write_stored,
)
from autoprune.report.table import markdown_table
from autoprune.tasks import Task

ROUNDS = 10  # of the final table that are measured, and kept, together

# The final table ------------------------------------------------------------------------------------------------------


def results(run: Run, *, again: bool = False) -> tuple[ResultRow, ...]:
    """Measures the final table, or reads it from the directory when it is of this machine and not wanted `again`."""
    fine_tuned, repacked = run.applied.fine_tuned, run.applied.repacked  # made anew, they remove the old one's results
    path = run.directory / "results.json"
    if path.exists() and not again:
        stored = read_stored(Results, path, "the results")
        if not (changed := differences(stored.machine, run.context.device.identity())):
            return stored.rows
        run.progress.say(f"the results are measured again: {'; '.join(changed)}")
    measured = measure_results(run, fine_tuned, repacked, from_start=again)
    return measured.rows


def measure_results(run: Run, fine_tuned: FineTuned, repacked: Repacked, *, from_start: bool = False) -> Results:
    """Measures the final table and saves it.

    Args:
        run: whose dense model and dense engines are measured, too.
        fine_tuned: the masked one.
        repacked: of that; its file is in the directory.
        from_start: whether rounds that an interrupted measurement kept are measured again.
    """
    context, prepared = run.context, run.prepared
    latency, machine = context.config.latency, context.device.identity()
    engines = run.search.engines
    forms = forms_of(context, prepared, engines, fine_tuned.model, repacked.model)
    left_out = {f"dense, {name}": why for name, why in engines.left_out.items()}
    context.progress.say(
        f"measuring: batch {latency.batch}, {latency.threads} thread(s), {latency.samples} rounds in turns"
    )
    record = _record_of_rounds(context, list(forms), machine)
    if from_start:
        record.clear()
    timed = {name: form.candidate for name, form in forms.items() if form.candidate is not None}
    times = _measured(timed, prepared.task.example_inputs(latency.batch), context, record)
    rows = _result_rows(context, prepared, forms, times, left_out)
    how = {"batch": latency.batch, "threads": latency.threads, "device": str(context.device)}
    measured = Results(rows, {**how, "rounds, all rows in turns": latency.samples}, machine)
    write_stored(context.directory / "results.json", measured)
    record.clear()
    return measured


def _tested(task: Task, model: nn.Module, row: str) -> float:
    try:
        return task.test(model)
    except (GivenError, NumericalError) as error:
        raise type(error)(
            f"the final table has no score for its row {row!r}: {error} All that was made is in the run's directory: "
            "once that is mended, the same command goes on from here."
        ) from error.__cause__ or error


def _record_of_rounds(context: Context, rows: list[str], machine: Mapping[str, Any]) -> MeasurementRecord:
    """What was measured so far of the final table."""
    with (context.directory / "repacked.safetensors").open("rb") as file:
        repacked = hashlib.file_digest(file, "sha256").hexdigest()
    latency = context.config.latency.model_dump(mode="json")
    about = {"rows": rows, "repacked": repacked, "latency": latency, "machine": machine}
    return MeasurementRecord(context.directory / "results.rounds.jsonl", about)


def _measured(
    timed: Mapping[str, Candidate], inputs: tuple[Any, ...], context: Context, record: MeasurementRecord
) -> dict[str, Latency]:
    """Times all rows in turns, `ROUNDS` rounds at a time, which are kept: all of them take minutes of a large model."""
    protocol, device = context.final_protocol, context.device
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for first in range(0, protocol.samples, ROUNDS):
        part = replace(protocol, samples=min(ROUNDS, protocol.samples - first))

        def measure(part: Protocol = part) -> dict[str, tuple[float, ...]]:
            times = device.time(timed, inputs, part, context.clock)
            return {name: each.samples_ms for name, each in times.items()}

        for name, values in record(f"from round {first}", measure).items():
            samples[name] += values
    return {name: Latency.from_samples(values, protocol.threads) for name, values in samples.items()}


def _result_rows(
    context: Context,
    prepared: Prepared,
    forms: Mapping[str, Form],
    times: Mapping[str, Latency],
    left_out: Mapping[str, str],
) -> tuple[ResultRow, ...]:
    """The rows in this order: torch eager, other engines, those left out, masked, repacked."""
    dense_file = context.directory / "dense.safetensors"
    write_tensors(dense_file, prepared.dense.state_dict())
    size, parameters = dense_file.stat().st_size, sum(p.numel() for p in prepared.dense.parameters())
    kept = nonzero_parameters(forms[MASKED].model or prepared.dense)
    packed_size = (context.directory / "repacked.safetensors").stat().st_size
    compared = {EAGER, *(f"dense, {name}" for name in compared_engines(context.config.precision))}
    compared &= times.keys()
    best = min(compared or {WHOLE}, key=lambda name: times[name].median_ms)
    scores: dict[int, float] = {}

    def score(name: str) -> float | None:
        model = forms[name].model
        if model is not None and id(model) not in scores:  # several forms of one model have one score
            scores[id(model)] = _tested(prepared.task, model, name)
        return None if model is None else scores[id(model)]

    def row(name: str, count: int, size_bytes: int) -> ResultRow:
        took, form = times.get(name), forms[name]
        label = f"{name}, best engine" if name == best and name in compared - {EAGER} else name
        over_eager, over_best = (
            speedup(times[other], took) if took is not None and other in times else None for other in (EAGER, best)
        )
        return ResultRow(
            label, score(name), took, over_eager, over_best, count, size_bytes,
            precision=form.precision, snr_db=form.snr_db(),
        )  # fmt: skip

    ours = (MASKED, CALLED, REPACKED)
    rows = [row(name, parameters, size) for name in forms if name not in ours]
    rows += [ResultRow(name, left_out=why) for name, why in left_out.items()]
    return (*rows, row(MASKED, kept, size), *(row(name, kept, packed_size) for name in ours[1:] if name in forms))


def latency_text(table: LatencyTable) -> str:
    """The latency table for reading: a row a layer and pattern, microseconds a call at each measured sparsity."""
    rows, sparsities = [], []
    for name, layer in table.layers.items():
        for pattern, curve in layer.curves.items():
            sparsities = [f"{100 * point.sparsity:.0f}%" for point in curve]
            cells = [f"{point.latency_us:.1f} {point.backend}" for point in curve]
            rows.append([name, pattern, f"{layer.dense_us:.1f}", *cells])
    return markdown_table(("layer", "pattern", "dense us", *sparsities), rows, left=2)


# What the report says -------------------------------------------------------------------------------------------------


def report_of(run: Run) -> RunReport:
    """Gathers what the report of a run is written from; runs the stages that are missing."""
    rows, config, metric = results(run), run.config, run.task.metric
    searched = run.search.exists
    record = Record(
        title=f"{run.task.name}: {config.target.text(metric, config.precision)}",
        facts={key: str(value) for key, value in _facts(run).items()},
        target=config.target,
        metric=metric,
        plan=_plan_rows(run),
        kept_dense=_kept_dense(run),
        searches=_search_rows(run) if searched else (),
        contenders=_contender_rows(run),
        sparsities=_sparsities(run),
        front=_front(run) if searched else None,
        rewards={config.search.agent.name: tuple(trial.reward for trial in succeeded(run.searched.trials))}
        if searched
        else None,
        unpruned=_unpruned(run),
        precision=config.precision,
        device=None if run.context.device.runs_torch else str(run.context.device),
    )
    hparams = {
        "agent": str(config.search.agent),
        "episodes": config.search.episodes,
        "target": config.target.text(metric, config.precision),
        "recovery": str(config.env.recovery),
        "training": "none" if config.finetune.post_training else str(run.plan.training),
        "learning_rate": run.preparation.subject.settings.learning_rate,
        "seed": config.seed,
    }
    return RunReport(run.directory, rows, record, hparams)


def _training_facts(run: Run) -> dict[str, Any]:
    if run.config.finetune.post_training:
        return {
            "training": f"none: pruned after training, criterion {run.config.env.criterion}, {run.config.env.recovery}"
        }
    return {"training": run.plan.training, "fine-tuning epochs": run.preparation.subject.settings.epochs}


def _facts(run: Run) -> dict[str, Any]:
    config = run.config
    facts = {
        "task": config.task,
        **run.task.facts,
        "target": config.target.text(run.task.metric, config.precision),
        "precision": config.precision,
        **({} if run.context.device.runs_torch else {"device": run.context.device}),
        **(_search_facts(run) if run.search.exists else {"plan": _origin(run)}),
        **_training_facts(run),
        "settings of the plan": dict(run.plan.settings) or "none",
        "seed": config.seed,
    }
    if remark := _distance(run):
        facts["distance from the target"] = remark
    if run.search.exists:
        facts |= _search_remarks(run)
    if run.task.testing is run.task.validation:
        facts["test split"] = "none was given: the figures are of the validation split that the search saw"
    return facts


def _unpruned(run: Run) -> str | None:
    """What repacking alone gives, where nothing is pruned for that."""
    return None if any(_sparsities(run).values()) else run.unpruned


def _origin(run: Run) -> str:
    """Where a plan is from that was not searched for."""
    given = _unpruned(run) is None
    return "given, not searched for" if given else "nothing is pruned: repacking alone meets the target"


def _distance(run: Run) -> str | None:
    """Why the run's plan is pruned for more than the target, where it is."""
    path = run.directory / CORRECTED
    found = read_json(path, "how near the target plans are") if path.exists() else {}
    remark: str | None = found.get(run.plan.key, {}).get("remark")
    return remark


def _search_facts(run: Run) -> dict[str, Any]:
    config, halving = run.config, run.config.search.halving
    return {
        "agent": config.search.agent,
        "episodes": config.search.episodes,
        "actions": ", ".join(map(str, config.env.actions)),
        "recovery before scoring": config.env.recovery,
        "successive halving": f"{halving.plans} plans from {halving.steps} steps on" if halving else "none",
    }


def _search_remarks(run: Run) -> dict[str, str]:
    remarks, trials = {}, run.searched.trials
    if run.search.comparison.uniform is None:
        remarks["uniform, same speed-up"] = "no uniform plan was measured to be as fast as the agent's"
    if reasons := [trial.evaluated.reason for trial in trials if isinstance(trial.evaluated, Failure)]:
        remarks["failed trials"] = f"{len(reasons)} of {len(trials)}; the first: {reasons[0]}"
    return remarks


def _plan_rows(run: Run) -> tuple[PlanRow, ...]:
    rows, here = [], run.context.device.runs_torch
    lowered, sparsities = {row.name: row for row in run.repacked.report}, _sparsities(run)
    for name, layer in run.plan.layers.items():
        made = lowered[name]
        packed_us = made.packed_us if made.backend != "dense" else made.dense_us
        times_us = (made.dense_us, packed_us) if here else _on_device_us(run, name, layer, sparsities[name])
        rows.append(
            PlanRow(
                layer=name,
                weights=run.prepared.inventory[name].weights,
                sparsity=sparsities[name],
                pattern=str(layer.pattern),
                criterion=str(layer.criterion),
                backend=made.backend,
                dense_us=times_us[0],
                latency_us=times_us[1],
                precision=_precision_of(layer, made),
                scale=made.scale,
                snr_db=made.snr_db,
            )
        )
    return tuple(rows)


def _precision_of(planned: LayerPlan, made: LayerReport) -> str:
    """The precision that a layer was made in; and why, where the plan says int8."""
    if planned.precision in ("float32", made.precision):
        return made.precision
    return f"{made.precision}, not {planned.precision}: {made.why}"


def _on_device_us(run: Run, name: str, layer: LayerPlan, sparsity: float) -> tuple[float, float]:
    """What a layer takes on the run's device, dense and pruned, by the latency table: tuning has only timed it here."""
    table = run.preparation.table
    return table.dense_us(name), table.layer_us(name, layer.curve, sparsity)


def _sparsities(run: Run) -> dict[str, float]:
    """Zeros of each planned layer in the end: the plan's, or where the method found the layers' shares, its own."""
    return {name: sparsity(weight_of(run.masked, name)) for name in run.plan.layers}


def _kept_dense(run: Run) -> tuple[KeptDense, ...]:
    """Layers that were never offered, and planned ones that no backend makes faster."""
    lost = [
        KeptDense(row.name, row.kind, row.why)
        for row in run.repacked.report
        if row.backend == "dense" and row.name in run.plan.layers
    ]
    timed = run.search.exists or (run.config.target.timed and any(_sparsities(run).values()))
    offered = run.preparation.offered if timed else run.prepared.inventory
    return (*offered.dense, *lost)


def _search_rows(run: Run) -> tuple[SearchRow, ...]:
    """The agent, every rule, and the uniform rule at exactly the speed-up of the plan that was chosen."""
    searched, uniform, agent = run.searched, run.search.comparison.uniform, str(run.config.search.agent.name)
    contenders = read_contenders(run.directory)

    def row(name: str, trial: Trial, evaluations: int) -> SearchRow:
        figures = trial.measurement
        return SearchRow(name, evaluations, trial.reward, figures.score, figures.latency_ms, figures.speedup)

    best = best_by_source(searched, agent)
    chosen = winner(contenders).source if contenders else next(iter(best))
    spent = {name: len(trials) for name, trials in {agent: searched.trials, **searched.rules}.items()}
    rows = [
        row(f"{name}, chosen" if name == chosen else name, best[name], count)
        for name, count in spent.items()
        if name in best
    ]
    if uniform is not None:
        uniform = as_trial(run.problem, uniform.plan, uniform.measurement)  # rewarded for the same target as the others
        rows.append(row("uniform, same speed-up", uniform, run.search.comparison.evaluations))
    return tuple(rows)


def _contender_rows(run: Run) -> tuple[ContenderRow, ...]:
    """The plans that were fine-tuned before one was chosen."""
    contenders = read_contenders(run.directory)
    won = winner(contenders) if contenders else None
    return tuple(
        ContenderRow(each.source, each is won, each.speedup, each.validation, each.test) for each in contenders
    )


def _front(run: Run) -> Front:
    uniform = run.search.comparison.uniform
    return Front(
        trials=tuple(point(trial.measurement) for trial in succeeded(run.searched.all)),
        best=point(run.searched.best.measurement),
        dense=MeasuredPoint(run.preparation.table.dense_ms, run.prepared.dense_score),
        uniform=point(uniform.measurement) if uniform else None,
    )
