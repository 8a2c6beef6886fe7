"""What int8 costs a pruned model, and what it gives.

    python -m benchmarks precision --tasks digits --seeds 1  # the embedded digits: some minutes
    python -m benchmarks precision                           # Fashion-MNIST too: hours; stop it, and go on, at any time
    python -m benchmarks precision --again                   # measure the models that are there once more
    python -m benchmarks precision --report                  # the page again, from what is there

A dense model is trained, then pruned gradually while it is trained on, every layer but the first and the last alike, in
groups of filters, with or without blocks of four neighbouring channels, as int8 layers read them. Each model is
repacked in float32 and, with the task's calibration batches, in int8; the two are scored on the test split and timed in
turns, one sample, one thread. Rows and models are kept as soon as they are there. Writes
benchmarks/results/precision.md.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from autoprune.evaluation.dense import dense_model
from autoprune.evaluation.recovery.base import Subject
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.files import cache_folder, read_tensors, write_tensors
from autoprune.latency.timer import Protocol, measure_together
from autoprune.masks import sparsity as share_of_zeros
from autoprune.model.inventory import as_tuple
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.repack import repack
from autoprune.report.console import Console
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, Task
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line, listed
from benchmarks.lib.page import write_page
from benchmarks.lib.sweep import Rows, missing, sweep
from benchmarks.methods import prunable
from benchmarks.methods_table import TASKS_SHOWN
from benchmarks.precision_report import DENSE, Outcome, report

KEPT = cache_folder() / "benchmarks" / "precision"  # models and unfinished training
TASKS_TRIED = ("digits", "fashion_mnist")
PATTERNS_TRIED: Mapping[str, Choice] = {
    "group 8": Choice("group", {"size": 8}),
    "group 8, block 4": Choice("group", {"size": 8, "block": 4}),
    "group 16, block 4": Choice("group", {"size": 16, "block": 4}),
}
SPARSITIES = (0.75, 0.9, 0.95)
TUNING = TrainingSettings(learning_rate=0.05, distillation_weight=0.5)
TIMING = Protocol(samples=60, threads=1)


class Point(NamedTuple):
    """One model. `pattern` is a key of PATTERNS_TRIED, or DENSE at sparsity 0."""

    seed: int
    task: str
    pattern: str
    sparsity: float


def main(argv: Sequence[str]) -> int:
    parser = command_line("precision", __doc__)
    add_seeds(parser, 3)
    parser.add_argument("--tasks", type=among(TASKS_TRIED), default=TASKS_TRIED, help=", ".join(TASKS_TRIED))
    parser.add_argument("--sparsities", type=listed(float), default=SPARSITIES, help="default 0.75,0.9,0.95")
    parser.add_argument("--again", action="store_true", help="measure what has a row, too; nothing is trained again")
    add_report(parser)
    given = parser.parse_args(argv)
    rows, failed = Rows(given.output / "precision.jsonl", Outcome), 0
    try:
        if not given.report:
            torch.set_num_threads(1)
            wanted = points(given.seeds, given.tasks, given.sparsities)
            failed = sweep(rows, missing(rows, wanted, given.again), measure, Console(), note=str)
    finally:
        write_page(given.output, "precision", report(rows.read()))
    return int(failed > 0)


def points(seeds: int, tasks: Sequence[str], sparsities: Sequence[float]) -> list[Point]:
    """Seed by seed, each task's dense model first."""
    variants = [(DENSE, 0.0), *((pattern, sparsity) for sparsity in sparsities for pattern in PATTERNS_TRIED)]
    return [Point(seed, task, *variant) for seed in range(seeds) for task in tasks for variant in variants]


def measure(point: Point) -> Outcome:
    """Trains one model, unless it is there already, and measures it in both precisions."""
    task = _task(point.task, point.seed)
    model = trained(point).eval()
    x, batches = task.example_inputs(1), [as_tuple(given) for given, _ in task.calibration]
    made = {
        "float32": repack(model, x, threads=1),
        "int8": repack(model, x, threads=1, precision="int8", calibration=batches),
    }
    times = measure_together({name: each.bind(*x) for name, each in made.items()}, TIMING)
    names = prunable(model, task).names
    return Outcome(
        **point._asdict(),
        zeros=min(share_of_zeros(weight_of(model, name)) for name in names),
        scores={name: task.test(each) for name, each in made.items()},
        times_ms={name: times[name].median_ms for name in made},
    )


@cache
def _task(name: str, seed: int) -> Task:
    return TASKS.create(TASKS_SHOWN[name].choice(seed))


def trained(point: Point) -> nn.Module:
    """The model of a point; what was trained once is kept."""
    shown, task = TASKS_SHOWN[point.task], _task(point.task, point.seed)
    dense = dense_model(task, shown.choice(point.seed), shown.dense, point.seed, Console())
    if point.pattern == DENSE:
        return dense
    model, path = copy.deepcopy(dense), _path(point)
    if path.exists():
        model.load_state_dict(read_tensors(path, "the pruned model")[0])
        return model
    inventory = prunable(dense, task)
    layer = LayerPlan(point.sparsity, PATTERNS_TRIED[point.pattern])
    plan = Plan(dict.fromkeys(inventory.names, layer), training=Choice("gradual"))
    settings = TUNING.changed({"epochs": shown.epochs - shown.start_epochs})
    subject = Subject(task, dense, inventory, {}, settings, point.seed)
    unfinished = path.with_suffix(".training")
    finetune_(model, plan, subject, settings, checkpoint=unfinished)
    write_tensors(path, model.state_dict())
    shutil.rmtree(unfinished, ignore_errors=True)
    return model


def _path(point: Point) -> Path:
    pattern = point.pattern.replace(", ", "-").replace(" ", "")
    return KEPT / f"{TASKS_SHOWN[point.task].key}-{pattern}-{point.sparsity:g}-{point.seed}.safetensors"
