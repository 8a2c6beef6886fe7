"""What pruning costs recurrent networks, in weights and in states, and what it gives.

    python -m benchmarks recurrent_training --tasks spoken_digits,japanese_vowels  # an hour on one core
    python -m benchmarks recurrent_training --tasks moby_dick  # half an hour a run; with cut states two hours
    python -m benchmarks recurrent_training --time  # times the models of the first seed
    python -m benchmarks recurrent_training --report  # draws what there is

Every run of a task trains for the same epochs from the same initial weights, whatever it prunes: weights by `gradual`
in groups of 16 rows with the ERK allocation (the last layer stays dense), states by keeping the largest at every step.
Runs are kept as they end, so a run that was stopped goes on; so does a training, from its last epoch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import nn

import autoprune
from autoprune.allocation import WeightCost
from autoprune.files import cache_folder, read_tensors, write_tensors
from autoprune.latency.engines import ENGINES, baselines
from autoprune.latency.machine import machine_text
from autoprune.latency.timer import Latency, Protocol, measure_together, speedup
from autoprune.metric import ACCURACY, BITS_PER_CHARACTER, Metric
from autoprune.model.inventory import as_tuple, take_inventory
from autoprune.model.recurrent.modules import cut_states_, recurrent_modules
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.report.table import MISSING, markdown_table
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, Task, japanese_vowels, moby_dick, spoken_digits
from autoprune.training import TRAINING
from autoprune.training.loop import count_batches, train_
from autoprune.training.widening import make_pruner_
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.sweep import Row, Rows, missing, seed_by_seed, sweep

KEPT = cache_folder() / "benchmarks" / "recurrent"
GROUP = 16
DEEPENS = 0.8  # of the training: until then more and more of the states is cut
ABOUT = """\
Every run of a task trains for the same epochs from the same initial weights, whatever it prunes: weights by `gradual`
in groups of 16 rows with the ERK allocation (the last layer stays dense), states by keeping the largest at every step.
Worse than dense: than the dense training that is best on the validation split; nothing was chosen on a test split.
"""
PROTOCOL = Protocol(samples=25, warmup=3, threads=1, min_sample_ms=2.0, lead=1)


@dataclass(frozen=True)
class Variant:
    """What is pruned: a share of the weights, and all states but a share; and dropout, where it is not the task's."""

    weights: float = 0.0
    states: float = 1.0
    dropout: float | None = None

    @property
    def place(self) -> tuple[float, float, float]:
        """Sorts dense ones first, those that are pruned most last."""
        return self.weights, -self.states, self.dropout or 0.0

    @property
    def is_dense(self) -> bool:
        return not self.weights and self.states == 1.0

    def __str__(self) -> str:
        parts = [f"{self.weights:.0%} of the weights cut"] if self.weights else []
        parts += [f"{self.states:.0%} of each state kept"] if self.states < 1.0 else []
        parts = parts or ["dense"]
        return ", ".join(parts + ([] if self.dropout is None else [f"dropout {self.dropout:g}"]))


@dataclass(frozen=True)
class Shown:
    """A task and what is pruned of its model, the most telling first.

    Attributes:
        own: the task's own dense training.
        longer: times its epochs.
        end: fraction of a run at which its weights are as sparse as asked for.
        metric: the task's.
    """

    name: str
    own: TrainingSettings
    variants: tuple[Variant, ...]
    longer: int = 1
    end: float = 0.6
    metric: Metric = ACCURACY

    @property
    def training(self) -> TrainingSettings:
        """Of every run, dense ones too."""
        return self.own.changed({"epochs": self.longer * self.own.epochs})

    @property
    def method(self) -> Choice:
        return Choice("gradual", {"end": self.end, "allocation": "erk"})


SMALL = (Variant(), Variant(0.9), Variant(0.0, 0.2), Variant(0.9, 0.2), Variant(0.95), Variant(0.0, 0.1))
TEXT = (Variant(0.8), Variant(), Variant(dropout=0.2), Variant(0.9), Variant(0.8, 0.2))
SHOWN = {
    each.name: each
    for each in (
        Shown("spoken_digits", spoken_digits.DENSE_TRAINING, SMALL, longer=3),
        Shown("japanese_vowels", japanese_vowels.DENSE_TRAINING, SMALL),
        Shown("moby_dick", moby_dick.DENSE_TRAINING, TEXT, longer=3, end=0.4, metric=BITS_PER_CHARACTER),
    )
}


@dataclass(frozen=True)
class Job:
    """One run."""

    task: str
    variant: Variant
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome(Row):
    """A run's figures; `zeros` is the share of state entries that are zero at the real steps of the test split."""

    task: str
    variant: Variant
    seed: int
    validation: float
    test: float
    zeros: float
    sparsity: float
    seconds: float

    @property
    def key(self) -> Job:
        return Job(self.task, self.variant, self.seed)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        return cls(**{**data, "variant": Variant(**data["variant"])})


@dataclass(frozen=True)
class Timing(Row):
    """A packed model of the first seed beside the dense engines, in turns.

    Attributes:
        ms: of one inference.
        best: the fastest dense engine.
        speedup: over that engine.
        shape: of each input.
        machine: where it was timed.
    """

    task: str
    variant: Variant
    ms: float
    best: str
    best_ms: float
    speedup: float
    shape: list[list[int]]
    machine: str

    @property
    def key(self) -> tuple[str, Variant]:
        return self.task, self.variant

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        return cls(**{**data, "variant": Variant(**data["variant"])})


def runs_of(folder: Path) -> Rows[Outcome]:
    return Rows(folder / "recurrent_training" / "runs.jsonl", Outcome)


def times_of(folder: Path) -> Rows[Timing]:
    return Rows(folder / "recurrent_training" / "times.jsonl", Timing)


def make_task(shown: Shown, seed: int, dropout: float | None = None) -> Task:
    more = {} if dropout is None else {"dropout": dropout}
    return TASKS.create(Choice(shown.name, {"seed": seed, **more}))


def model_path(shown: Shown, variant: Variant, seed: int) -> Path:
    dropout = "" if variant.dropout is None else f"-dropout-{variant.dropout:g}"
    return KEPT / f"{shown.name}-{variant.weights:g}-{variant.states:g}{dropout}-{seed}.safetensors"


def train_one(job: Job, console: Console) -> Outcome:
    """One run, from its last epoch when it was stopped before."""
    torch.set_num_threads(1)
    shown, variant, seed = SHOWN[job.task], job.variant, job.seed
    task = make_task(shown, seed, variant.dropout)
    model, x, settings = copy.deepcopy(task.model), task.example_inputs(2), shown.training
    if variant.states < 1.0:
        cut_states_(model, keep=variant.states, over=round(DEEPENS * settings.epochs * count_batches(task.train)))
    inventory = take_inventory(model, x)
    inventory = take_inventory(model, x, keep_dense=(inventory.names[-1],))
    method = pruner = None
    if variant.weights:
        layer = LayerPlan(variant.weights, Choice("group", {"size": GROUP}))
        method, plan = TRAINING.create(shown.method), Plan(dict.fromkeys(inventory.names, layer), shown.method)
        pruner = make_pruner_(method, model, inventory, plan, x, task.calibration, task.loss, WeightCost)
    path, start = model_path(shown, variant, seed), time.process_time()
    train_(
        model, task.train, task.loss, settings, seed=seed, method=method, pruner=pruner,
        checkpoint=path.with_suffix(".training"), progress=console, title=str(job),
    )  # fmt: skip
    model.eval()
    write_tensors(path, model.state_dict())
    weights = [weight_of(model, name) for name in inventory.names]
    cut = 1.0 - sum(int(torch.count_nonzero(each)) for each in weights) / sum(each.numel() for each in weights)
    return Outcome(
        shown.name, variant, seed, task.evaluate(model), task.test(model), zero_states(model, task), cut,
        time.process_time() - start,
    )  # fmt: skip


@torch.inference_mode()
def zero_states(model: nn.Module, task: Task) -> float:
    """The share of state entries that are zero; steps behind the end of a sequence are left out."""
    zeros = total = 0
    lengths: torch.Tensor | None = None

    def count(_module: nn.Module, _given: Any, output: Any) -> None:
        nonlocal zeros, total
        states = output[0]
        real = torch.ones(states.shape[:2], dtype=torch.bool)
        if lengths is not None:
            real = torch.arange(states.shape[1]) < lengths[:, None]
        zeros += int((states == 0)[real].sum())
        total += int(real.sum()) * states.shape[2]

    hooks = [module.register_forward_hook(count) for _, module in recurrent_modules(model)]
    for inputs, _ in task.testing:
        given = as_tuple(inputs)
        lengths = given[1] if len(given) > 1 else None
        model(*given)
    for hook in hooks:
        hook.remove()
    return zeros / max(1, total)


def time_models(names: Sequence[str], folder: Path, console: Console) -> None:
    """Times the first seed's models, packed, in turns with the dense engines."""
    torch.set_num_threads(1)
    for name in names:
        shown = SHOWN[name]
        task = make_task(shown, 0)
        x = task.example_inputs(1)
        done = [each.variant for each, _ in runs_of(folder).read() if each.task == name and each.seed == 0]
        variants = [variant for variant in done if model_path(shown, variant, 0).exists()]
        for variant in sorted(set(done) - set(variants), key=lambda each: each.place):
            console.say(f"{name}, {variant}: its model is not kept here; not timed")
        if not variants:
            continue
        calls: dict[Any, Any] = {
            engine: ENGINES.create(Choice(engine)).prepare(task.model, x, 1) for engine in baselines()
        }
        for variant in variants:
            model = copy.deepcopy(task.model)
            if variant.states < 1.0:
                cut_states_(model, keep=variant.states, over=1)
            model.load_state_dict(read_tensors(model_path(shown, variant, 0), "the model")[0])
            calls[variant] = partial(autoprune.repack(model.eval(), x, threads=1), *x)
            console.say(f"{name}, {variant}: repacked")
        times: dict[Any, Latency] = {**measure_together(calls, PROTOCOL)}
        best = min((each for each in times if isinstance(each, str)), key=lambda each: times[each].median_ms)
        for variant in variants:
            times_of(folder).add(Timing(
                name, variant, times[variant].median_ms, best, times[best].median_ms,
                speedup(times[best], times[variant]), [list(each.shape) for each in x], machine_text(),
            ))  # fmt: skip


def report(folder: Path) -> str:
    """The page, from the rows."""
    parts, outcomes = [ABOUT], [each for each, _ in runs_of(folder).read()]
    timed = times_of(folder).last()
    for machine in sorted({row.machine for row in timed.values()}):
        parts.append(f"Timed on {machine}, one thread, batch 1, against the best dense engine of that run.")
    for name, shown in SHOWN.items():
        runs = [each for each in outcomes if each.task == name]
        if not runs:
            continue
        dense, difference = best_dense(runs), partial(_difference, shown.metric)
        rows = []
        for variant in sorted({each.variant for each in runs}, key=lambda each: each.place):
            own = [each for each in runs if each.variant == variant]
            tests, time_row = [each.test for each in own], timed.get((name, variant))
            rows.append((
                str(variant), f"{fmean(each.sparsity for each in own):.1%}", f"{fmean(each.zeros for each in own):.1%}",
                shown.metric.text(fmean(tests)), difference(pstdev(tests)) if len(tests) > 1 else MISSING,
                MISSING if dense is None else difference(dense - fmean(tests)), str(len(own)),
                MISSING if time_row is None else f"{time_row.ms:.3f}",
                MISSING if time_row is None else f"{time_row.speedup:.2f}x ({time_row.best})",
            ))  # fmt: skip
        header = (
            "pruned", "zero weights", "zero states", f"test {shown.metric.name}", "deviation", "worse than dense",
            "runs", "ms", "times best dense",
        )  # fmt: skip
        parts += [f"## {name}, {shown.training.epochs} epochs", markdown_table(header, rows)]
    return page("What pruning costs recurrent networks", "recurrent_training", "", *parts)


def best_dense(runs: Sequence[Outcome]) -> float | None:
    """Mean test score of the dense training that is best on the validation split; None before there is one."""
    dense: dict[Variant, list[Outcome]] = {}
    for each in runs:
        if each.variant.is_dense:
            dense.setdefault(each.variant, []).append(each)
    best = max(dense.values(), key=lambda own: fmean(each.validation for each in own), default=None)
    return None if best is None else fmean(each.test for each in best)


def _difference(metric: Metric, drop: float) -> str:
    return f"{abs(metric.factor) * drop:.{metric.digits}f}"


def jobs(names: Sequence[str], variants: int, seeds: int) -> list[Job]:
    """What is asked for, seed by seed."""
    return [
        Job(name, variant, seed)
        for seed, name in seed_by_seed(seeds, names)
        for variant in SHOWN[name].variants[:variants]
    ]


def main(argv: Sequence[str]) -> int:
    parser = command_line("recurrent_training", __doc__)
    parser.add_argument("--tasks", type=among(SHOWN), default=tuple(SHOWN), help="of " + ", ".join(SHOWN))
    parser.add_argument("--variants", type=int, default=99, help="only the first so many")
    add_seeds(parser, 3)
    parser.add_argument("--time", action="store_true", help="time the models of finished runs, and train nothing")
    add_report(parser)
    given, console = parser.parse_args(argv), Console()
    rows, failed = runs_of(given.output), 0
    try:
        if given.time:
            time_models(given.tasks, given.output, console)
        elif not given.report:
            wanted = missing(rows, jobs(given.tasks, given.variants, given.seeds))
            failed = sweep(
                rows, wanted, partial(train_one, console=console), console, note=lambda row: f"{row.test:.4f}"
            )
    finally:
        if rows.read():
            write_page(given.output, "recurrent_training", report(given.output))
    return int(failed > 0)
