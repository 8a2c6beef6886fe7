"""Every training method at one budget of epochs, pattern and sparsity.

    python -m benchmarks methods --quick                    # the embedded digits: about ten minutes
    python -m benchmarks methods                            # Fashion-MNIST: hours; stop it, and go on, at any time
    python -m benchmarks methods --methods adaptive,gradual --settings group-90,group-97 --seeds 1
    python -m benchmarks methods --time                     # the repacked models' speed, on an otherwise idle machine
    python -m benchmarks methods --report                   # the table and the plots again, from what is there

A run is one method in one setting with one seed. All runs of a task train for the same number of epochs in all: where a
method starts from a trained model, that training counts. Runs are kept in benchmarks/results/methods/ as they end, and
a run that was stopped goes on from its last epoch; two run at a time, a core each. The masked models are kept in the
user's cache folder, for --time. benchmarks/results/methods_TASK.md and the plots beside it are drawn from these files.

Nothing is chosen on the test split: it is read once, at the end of a run.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from autoprune.allocation import Cost, MacsCost, WeightCost
from autoprune.evaluation.recovery.finetune import channel_readers
from autoprune.files import cache_folder, read_tensors, write_tensors
from autoprune.latency.engines import ENGINES, baselines
from autoprune.latency.machine import machine_text
from autoprune.latency.timer import Protocol, measure_together, speedup
from autoprune.masks import sparsity
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.repack import remaining_macs, repack
from autoprune.report.console import Console
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, Task
from autoprune.training import TRAINING, OnSignals, Pruner, SparseTraining, recalibrate_batch_norm_, train_
from autoprune.training.base import Signals
from autoprune.training.bayesian import Bayesian
from autoprune.training.widening import make_pruner_
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line
from benchmarks.lib.sweep import missing, seed_by_seed, sweep
from benchmarks.methods_report import DENSE, Job, Outcome, Timing, report, runs_of, times_of
from benchmarks.methods_table import RECIPES, SETTINGS, TASKS_SHOWN, Recipe, Setting, Shown

WORKERS = 2
ROUNDS = 60  # of --time
KEPT = cache_folder() / "benchmarks" / "methods"  # models and unfinished runs


def main(argv: Sequence[str]) -> int:
    given, failed = _arguments(argv), 0
    shown = TASKS_SHOWN["digits" if given.quick else given.task]
    try:
        if given.time:
            time_models(shown, given.output, Console())
        elif not given.report:
            failed = train_all(shown, _jobs(shown, given), given.output, given.workers)
    finally:
        print(report(given.output, shown))
    return int(failed > 0)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line("methods", __doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded digits, one setting")
    parser.add_argument("--task", choices=list(TASKS_SHOWN), default="fashion_mnist")
    parser.add_argument("--methods", type=among(RECIPES), help="rows, e.g. adaptive,gradual; all when left out")
    parser.add_argument("--settings", type=among(SETTINGS), help=f"of {', '.join(SETTINGS)}; default the task's")
    add_seeds(parser, usual="the task's own")
    parser.add_argument("--workers", type=int, default=WORKERS, help="runs at a time, one thread each")
    parser.add_argument("--time", action="store_true", help="time the models of finished runs, and train nothing")
    add_report(parser)
    return parser.parse_args(argv)


def _jobs(shown: Shown, given: argparse.Namespace) -> list[Job]:
    """What is missing, dense training first."""
    names, settings = given.methods or tuple(RECIPES), given.settings or shown.settings
    seeds = given.seeds or shown.seeds
    wanted = [
        Job(name, setting, seed)
        for seed, setting, name in seed_by_seed(seeds, settings, names)
        if name != DENSE and RECIPES[name].fits(setting)
    ]
    dense = [Job(DENSE, "", seed) for seed in range(seeds)]
    return missing(runs_of(given.output, shown), dense + wanted)


def train_all(shown: Shown, jobs: Sequence[Job], folder: Path, workers: int) -> int:
    """Trains the dense models that runs start from, then makes the runs; returns how many failed."""
    starts = sorted(
        {(job.seed, RECIPES[job.method].dense_epochs(shown)) for job in jobs} - {(job.seed, 0) for job in jobs}
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for ready in as_completed([pool.submit(_start, shown, seed, epochs) for seed, epochs in starts]):
            ready.result()
        return sweep(
            runs_of(folder, shown), jobs, partial(train_one, shown), Console(), pool=pool,
            note=lambda outcome: f"{100 * outcome.test:.2f}% in {outcome.seconds:.0f} s",
        )  # fmt: skip


@cache
def _task(shown: Shown, seed: int) -> Task:
    return TASKS.create(shown.choice(seed))


def _start(shown: Shown, seed: int, epochs: int) -> tuple[nn.Module, float]:
    """The model that methods start from, trained densely for `epochs` (0: not at all), and the seconds it took."""
    torch.set_num_threads(1)
    task = _task(shown, seed)
    model = copy.deepcopy(task.model)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # trains a fifth faster
    if epochs == 0:
        return model, 0.0
    path = KEPT / f"{shown.key}-start{epochs}-{seed}.safetensors"
    if path.exists():
        tensors, about = read_tensors(path, "the dense model")
        model.load_state_dict(tensors)
        return model, float(about["seconds"])
    seconds = _timed_training(model, task, shown.dense.changed({"epochs": epochs}), seed, path)
    write_tensors(path, model.state_dict(), {"seconds": seconds})
    return model, seconds


def train_one(shown: Shown, job: Job) -> Outcome:
    """One run, from its last epoch when it was stopped before."""
    recipe, task = RECIPES[job.method], _task(shown, job.seed)
    model, seconds = _start(shown, job.seed, recipe.dense_epochs(shown))
    masked: dict[str, float] = {}
    watch: Rounds | None = None
    if recipe.method is not None:
        settings = shown.dense.changed({"epochs": shown.epochs - recipe.dense_epochs(shown), **recipe.settings})
        inventory, setting = prunable(model, task), SETTINGS[job.setting]
        x = task.example_inputs(1)
        plan, cost = planned(model, inventory, setting, recipe, x)
        method = TRAINING.create(recipe.method)
        pruner = make_pruner_(method, model, inventory, plan, x, task.calibration, task.loss, cost)
        watch = Rounds(method, model, task)
        seconds += _timed_training(model, task, settings, job.seed, model_path(shown, job), method, pruner, watch)
        seconds -= watch.seconds
        masked = {name: sparsity(weight_of(model, name)) for name in inventory.names}
    model.eval()
    write_tensors(model_path(shown, job), model.state_dict())
    macs = remaining_macs(model, task.example_inputs(1)) / remaining_macs(task.model, task.example_inputs(1))
    validation = task.evaluate(model)
    rounds = watch.ended(validation) if watch else ()
    return Outcome(job, validation, task.test(model), seconds, masked, macs, rounds)


class Rounds:
    """What each round of an iterative method comes to; called with the signals of the training loop.

    Attributes:
        accuracies: on the validation split, at the last signal before each cut but the first; batch norms recalibrated.
        seconds: processor time that evaluating took.
    """

    def __init__(self, method: SparseTraining, model: nn.Module, task: Task) -> None:
        self._method, self._model, self._task = method, model, task
        self._seen = 0
        self.accuracies: list[float] = []
        self.seconds = 0.0

    def __call__(self, step: int, signals: Signals) -> None:
        pace, self._seen = step - self._seen, step
        if any(step < cut <= step + pace for cut in self._cuts()):
            start = time.process_time()
            # between two steps at a high rate, what batch norms remember is far from what they now see
            model = recalibrate_batch_norm_(copy.deepcopy(self._model), self._task.calibration)
            self.accuracies.append(self._task.evaluate(model))
            self.seconds += time.process_time() - start

    def ended(self, accuracy: float) -> Sequence[float]:
        """Of all rounds, the last one's being the run's `accuracy`; empty where a run was stopped in between."""
        whole = self.accuracies and len(self.accuracies) == len(self._cuts())
        return [*self.accuracies, accuracy] if whole else []

    def _cuts(self) -> Sequence[int]:
        return self._method.decisions[1:] if isinstance(self._method, Bayesian) else ()


def _timed_training(
    model: nn.Module,
    task: Task,
    settings: TrainingSettings,
    seed: int,
    path: Path,
    method: SparseTraining | None = None,
    pruner: Pruner | None = None,
    on_signals: OnSignals | None = None,
) -> float:
    """Trains in place, resumable; returns the processor seconds of all epochs, by the mean of those seen."""
    ends = [time.process_time()]
    train_(
        model,
        task.train,
        task.loss,
        settings,
        seed=seed,
        method=method,
        pruner=pruner,
        checkpoint=path.with_suffix(".training"),
        on_epoch=lambda *_: ends.append(time.process_time()),
        on_signals=on_signals,
    )
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1) * settings.epochs


def prunable(model: nn.Module, task: Task) -> Inventory:
    """All layers but the first and the last, which hold 1% of the weights."""
    every = take_inventory(model, task.example_inputs(1))
    return take_inventory(model, task.example_inputs(1), keep_dense=(every.names[0], every.names[-1]))


def planned(
    model: nn.Module, inventory: Inventory, setting: Setting, recipe: Recipe, x: tuple[torch.Tensor, ...]
) -> tuple[Plan, Callable[[Inventory], Cost]]:
    """The plan of a setting, every layer alike, and what its budget counts."""

    def alike(sparsity: float) -> Plan:
        return Plan(dict.fromkeys(inventory.names, LayerPlan(sparsity, setting.pattern, recipe.criterion)))

    if not setting.macs:
        return alike(setting.sparsity), WeightCost
    readers = channel_readers(model, x, alike(0.5))
    cost = MacsCost(inventory, readers)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = cost(dict.fromkeys(inventory.names, middle)) <= (1.0 - setting.sparsity) * cost({})
        low, high = (low, middle) if enough else (middle, high)
    return alike(high), lambda wider: MacsCost(wider, readers)


def model_path(shown: Shown, job: Job) -> Path:
    return KEPT / f"{shown.key}-{job.key}.safetensors"


def _architecture(shown: Shown, job: Job) -> nn.Module:
    """The model of a run, untrained: wider than the task's where the method widens."""
    task = _task(shown, job.seed)
    model, choice = copy.deepcopy(task.model), RECIPES[job.method].method
    assert choice is not None
    plan = Plan(dict.fromkeys(prunable(model, task).names, LayerPlan(0.5, SETTINGS[job.setting].pattern)))
    TRAINING.create(choice).widen_(model, task.example_inputs(1), plan)
    return model


def time_models(shown: Shown, folder: Path, console: Console) -> None:
    """Times each row's first model that is kept here, repacked, in turns with the dense engines."""
    torch.set_num_threads(1)
    task = _task(shown, 0)
    x = task.example_inputs(1)
    dense = _start(shown, 0, shown.epochs)[0].eval()
    engines = {name: ENGINES.create(Choice(name)).prepare(dense, x[0], 1) for name in baselines()}
    outcomes = runs_of(folder, shown).last().values()
    jobs = [outcome.job for outcome in outcomes if outcome.job.method != DENSE]
    jobs.sort(key=lambda job: job.seed, reverse=True)
    first = {(job.setting, job.method): job for job in jobs if model_path(shown, job).exists()}
    for setting, method in sorted({(job.setting, job.method) for job in jobs} - set(first)):
        console.say(f"{method}, {setting}: no model is kept here; not timed")
    rows = []
    with console.bar("timing", len(first)) as bar:
        for job in first.values():
            model = _architecture(shown, job)
            model.load_state_dict(read_tensors(model_path(shown, job), "the masked model")[0])
            fast = repack(model.eval(), x, threads=1)
            times = measure_together({**engines, "repacked": lambda: fast(*x)}, Protocol(samples=ROUNDS, threads=1))  # noqa: B023
            best = min(engines, key=lambda name: times[name].median_ms)
            over_eager, over_best = (speedup(times[name], times["repacked"]) for name in ("eager", best))
            rows.append(Timing(job, over_eager, best, over_best, machine_text()))
            bar.advance(1, f"{job}: {rows[-1].over_best:.2f}x")
    kept = times_of(folder, shown)
    kept.path.unlink(missing_ok=True)
    for row in rows:
        kept.add(row)
