"""What a run would do, found before it is begun: what is pruned, what is in reach, and how long it takes."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoprune.envs.problem import Problem
from autoprune.envs.projection import check_limits
from autoprune.errors import InfeasibleTarget
from autoprune.latency.timer import torch_threads
from autoprune.pipeline.baselines import Baselines
from autoprune.pipeline.correction import check_reachable
from autoprune.pipeline.gauge import Reached
from autoprune.pipeline.run import Run, uniform_plan
from autoprune.plan import Plan
from autoprune.report.table import markdown_table
from autoprune.target import Target
from autoprune.tasks.batches import first_batches
from autoprune.training.loop import count_batches, train_

STEPS = 3  # of training that are timed
KEPT = (
    "config.json",
    "identity.json",
    "latency.json",
    "baselines.json",
    "plan.json",
)  # of a run, that a forecast reads


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        task: its name.
        target: what is asked for.
        target_text: the same as people read it.
        device: that latency is measured on.
        reference: what plans are timed beside there, as people read it.
        dense: the dense model's score on the validation split as people read it.
        layers: that can be pruned and save time where they are.
        weights: of these layers; likewise the multiply-adds of one sample, `macs`.
        kept_dense: layer -> why it stays dense.
        baselines: the dense engines, and the dense model repacked.
        table_was_read: whether the latency table was the run directory's, or in the user's cache; else it was measured.
        prunable: share of the reference's time that these layers take, by the latency table.
        predicted: speed-up over the reference of the most pruned model, by the latency table.
        sparsity: of every layer of that model.
        measured: what the most pruned model reaches of the target, where the table left a doubt; else None.
        refusal: why the run would be refused; None where it would not.
        unpruned: what repacking alone gives, where that meets the target and nothing would be pruned.
        minutes: part of the run -> how long it takes, estimated.
    """

    task: str
    target: Target
    target_text: str
    device: str
    reference: str
    dense: str
    layers: int
    weights: int
    macs: int
    kept_dense: Mapping[str, str]
    baselines: Baselines
    table_was_read: bool
    prunable: float
    predicted: float
    sparsity: float
    measured: Reached | None
    refusal: InfeasibleTarget | None
    unpruned: str | None
    minutes: Mapping[str, float]

    @property
    def repacking_alone(self) -> float:
        """The speed-up of the dense model repacked over what the target's is over."""
        return self.baselines.repacked / self._baseline

    @property
    def in_reach(self) -> float:
        """The speed-up over the same, of the most pruned model, by the latency table."""
        return self.predicted / self._baseline

    @property
    def _baseline(self) -> float:
        return self.baselines.over_reference(self.target.over)

    def text(self) -> str:
        """All of it as people read it."""
        over = self.baselines.name(self.target.over)
        whole: dict[str, list[str]] = {}
        for name, reason in self.kept_dense.items():
            whole.setdefault(reason, []).append(name)
        reach = f"{self.in_reach:.2f}x over {over} predicted, with every layer at sparsity {self.sparsity:g}"
        if self.measured is not None and self.measured.speedup is not None:
            reach += f"; {self.measured.speedup:.2f}x measured"
        if self.measured is not None and self.measured.latency_ms is not None:
            reach += f"; {self.measured.latency_ms:.4g} ms measured"
        parts = ", ".join(f"{part} {_short(minutes)}" for part, minutes in self.minutes.items())
        rows = [
            ("target", self.target_text),
            ("device", self.device),
            ("dense model", f"{self.dense} on the validation split"),
            ("pruned", f"{self.layers} layers: {self.weights:,} weights, {self.macs:,} multiply-adds a sample"),
            ("left whole", "; ".join(f"{', '.join(names)} ({reason})" for reason, names in whole.items()) or "none"),
            ("dense engines", self.baselines.text().partition(": ")[2]),
            (
                "latency table",
                f"{'read' if self.table_was_read else 'measured'}: the pruned layers take "
                f"{100 * self.prunable:.0f}% of the time of {self.reference}",
            ),
            ("repacking alone", f"{self.repacking_alone:.2f}x over {over}" + (": enough" if self.unpruned else "")),
            ("in reach", f"{reach}" + ("" if self.refusal is None else ": **the target is out of reach**")),
            ("minutes, about", f"{_short(math.fsum(self.minutes.values()))} ({parts})"),
        ]
        return f"# Dry run of {self.task}\n\n{markdown_table(('what', 'found'), rows, left=2)}"

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        measured = self.measured
        return {
            "task": self.task,
            "target": self.target.to_json(),
            "device": self.device,
            "layers": self.layers,
            "weights": self.weights,
            "macs": self.macs,
            "kept_dense": dict(self.kept_dense),
            "best_engine": self.baselines.best,
            "engines_ms": dict(self.baselines.ms),
            "table_was_read": self.table_was_read,
            "repacking_alone": self.repacking_alone,
            "in_reach_predicted": self.in_reach,
            "in_reach_measured": None if measured is None else measured.speedup,
            "out_of_reach": None if self.refusal is None else str(self.refusal),
            "nothing_to_prune": self.unpruned is not None,
            "minutes": dict(self.minutes),
        }


def _short(minutes: float) -> str:
    return f"{minutes:.1f}" if minutes >= 0.05 else "under 0.1"


def copy_for_forecast(directory: Path, folder: Path) -> None:
    """Copies what a forecast reads of a run's directory, where it is there, to a folder it may write in."""
    for name in KEPT:
        if (directory / name).exists():
            shutil.copy(directory / name, folder / name)


def forecast(run: Run, *, searches: bool = True, trains: bool = True) -> Forecast:
    """Measures what a run would do, and does none of it.

    Args:
        run: in a folder that may be written in: its latency table and its dense engines are measured, or read there.
        searches: whether the run searches for its plan.
        trains: whether the plan is fine-tuned and measured.

    Raises:
        ConfigError: the run plans without a search, and its target or its pattern leaves no plan to make.
    """
    context, prepared, clock = run.context, run.prepared, run.context.clock
    table_was_read, began_s = run.preparation.table_is_known, clock()
    table, offered = run.preparation.table, run.preparation.offered
    minutes = {} if table_was_read else {"latency table": (clock() - began_s) / 60}
    baselines = run.search.all_baselines
    if trains or run.search.baselines is not None:  # compiled for the final table, whether or not their times are known
        minutes["dense engines"] = baselines.prepared_s / 60
    problem, most_pruned = run.search.by_table, run.search.most_pruned
    unpruned = run.unpruned
    measured, refusal = (None, None) if unpruned is not None else _reach(run, problem, most_pruned)
    if unpruned is None and refusal is None:
        if searches and not (run.directory / "plan.json").exists():
            minutes["search, at most"] = _search_minutes(run, problem)
        if trains and not searches:
            uniform_plan(context, run.preparation, run.search)  # refused where there is none
        if trains:
            trainings = run.config.search.contenders if searches else 1
            if run.config.finetune.post_training:
                minutes["post-training pruning"] = trainings * _recovery_minutes(run, problem)
            else:
                minutes["fine-tuning"] = trainings * _training_minutes(run)
    if trains:
        minutes["final table"] = context.config.latency.samples * sum(baselines.ms.values()) / 60e3
    return Forecast(
        task=prepared.task.name,
        target=context.config.target,
        target_text=context.config.target.text(prepared.task.metric, context.config.precision),
        device=str(context.device),
        reference=context.device.reference_name,
        dense=prepared.task.metric.describe(prepared.dense_score),
        layers=len(offered.layers),
        weights=sum(layer.weights for layer in offered.layers),
        macs=sum(layer.macs for layer in offered.layers),
        kept_dense={row.name: row.reason for row in offered.dense},
        baselines=baselines,
        table_was_read=table_was_read,
        prunable=sum(table.dense_us(name) for name in offered.names) / 1e3 / table.dense_ms,
        predicted=max(map(table.predict_speedup, most_pruned)),
        sparsity=problem.max_sparsity,
        measured=measured,
        refusal=refusal,
        unpruned=unpruned,
        minutes=minutes,
    )


def _reach(run: Run, problem: Problem, most_pruned: list[Plan]) -> tuple[Reached | None, InfeasibleTarget | None]:
    """What the most pruned model was measured to reach, where that was in doubt, and why the target is refused."""
    measured: list[Reached] = []

    def measure(plan: Plan) -> Reached:
        measured.append(run.search.gauge.of_plan(plan))
        return measured[-1]

    refusal = None
    try:
        check_limits(problem)
        if run.context.measures:
            check_reachable(problem, most_pruned, measure)
    except InfeasibleTarget as error:
        refusal = error
    return max(measured, key=lambda each: each.least, default=None), refusal


def _search_minutes(run: Run, problem: Problem) -> float:
    """Of all episodes, as long as an evaluation takes, or as long as the search was given."""
    evaluate, clock = run.preparation.evaluator, run.context.clock
    evaluate(problem.uniform(0.5))  # the first one captures the model's graph
    began_s = clock()
    evaluate(problem.uniform(0.7))
    minutes = run.config.search.episodes * (clock() - began_s) / run.context.workers / 60
    return minutes if run.context.minutes is None else min(minutes, run.context.minutes)


def _recovery_minutes(run: Run, problem: Problem) -> float:
    """Of pruning without training, which is done once."""
    subject, began_s = run.preparation.subject, run.context.clock()
    with torch_threads(run.context.work_threads):
        run.context.choices.recovery.recover_(copy.deepcopy(run.dense), problem.uniform(0.5), subject)
    return (run.context.clock() - began_s) / 60


def _training_minutes(run: Run) -> float:
    """Of one fine-tuning, as long as steps of the dense model take."""
    context, task, settings = run.context, run.task, run.preparation.subject.settings
    batches = first_batches(task.train, STEPS)
    one_epoch = replace(settings, epochs=1)
    with torch_threads(context.work_threads):
        began_s = context.clock()
        train_(copy.deepcopy(run.dense), batches, task.loss, one_epoch, seed=context.config.seed, teachers=(run.dense,))
        took_s = context.clock() - began_s
    return settings.epochs * count_batches(task.train) * took_s / len(batches) / 60
