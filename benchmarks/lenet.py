"""How far LeNet-5 can be pruned at 0.1 point: ``python -m benchmarks lenet [--data NAME] [--seeds N]``.

MNIST as it is, which the papers prune this network on; with `--data fashion_mnist` the harder one, augmented. Single
weights, one ranking of all layers, which compare by LAMP. Every recipe starts from the same trained model, which also
teaches it, and walks a ladder of compressions (times fewer weights): up from the first rung while the mean validation
accuracy stays within 0.1 point of dense training, down while it does not. Each rung is a run a seed; a run that ended
is kept in benchmarks/results/lenet/ and never made again, so the search can be stopped and goes on. `--quick` trains on
6,000 images for few epochs: it shows that all this works, and is no figure to quote.

Dense training is compared with at as many epochs as start and pruning together. The test split chooses nothing. Run it
in the folder that MNIST's files were unpacked in; where they are missing, the error is the command that gets them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from autoprune.files import cache_folder, read_tensors, write_tensors
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.report.table import MISSING, markdown_table, mean_and_spread
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, Task
from autoprune.tasks.batches import TensorBatches
from autoprune.training import TRAINING, Pruner, train_
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import Row, Rows, missing, sweep

KEPT = cache_folder() / "benchmarks" / "lenet"
DATA: Mapping[str, bool] = {"mnist": False, "fashion_mnist": True}  # whether its images are augmented
LOSS_POINTS = 0.1
LADDER = (6.0, 12.0, 25.0, 50.0, 70.0, 90.0, 108.0, 140.0)
DENSE = "dense"
RECIPES: Mapping[str, Choice] = {
    "half": Choice("proximal", {"allocation": "lamp"}),
    "l1": Choice("proximal", {"penalty": "l1", "allocation": "lamp"}),
    "l2": Choice("proximal", {"penalty": "none", "allocation": "lamp"}),  # weight decay alone
    "gradual": Choice("gradual", {"allocation": "lamp"}),
    "splice": Choice("proximal", {"splice": True, "allocation": "lamp"}),
}


@dataclass(frozen=True)
class Protocol:
    """How long, and on what.

    Attributes:
        data: a row of `DATA`.
        images: of the train split; all when None.
        start_epochs: dense, before any recipe.
        epochs: of a recipe.
        first: the rung that each recipe begins with.
    """

    name: str
    images: int | None
    start_epochs: int
    epochs: int
    first: float
    data: str = "mnist"
    start: TrainingSettings = TrainingSettings(learning_rate=0.03, weight_decay=5e-4, warmup=0.05)  # noqa: RUF009
    pruning: TrainingSettings = TrainingSettings(  # noqa: RUF009
        learning_rate=0.03, weight_decay=1e-4, warmup=0.05, distillation_weight=0.5
    )

    @property
    def label(self) -> str:
        return f"{self.data}_{self.name}"


FULL = Protocol("full", None, start_epochs=20, epochs=40, first=70.0)
QUICK = Protocol("quick", 6_000, start_epochs=4, epochs=6, first=12.0)


@dataclass(frozen=True)
class Job:
    """A run to make: a recipe, times fewer weights (1 for dense training), a seed."""

    recipe: str
    factor: float
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe} {self.factor:g}x seed {self.seed}"


@dataclass(frozen=True)
class Run(Row):
    """One run.

    Attributes:
        factor: times fewer weights, as asked for; 1 for dense training.
        validation, test: accuracy, in [0, 1].
        reached: times fewer weights, biases left out, as counted in the model.
        seconds: processor time, the start left out; of the part since the last resume.
    """

    recipe: str
    factor: float
    seed: int
    validation: float
    test: float
    reached: float
    seconds: float

    @property
    def key(self) -> Job:
        return Job(self.recipe, self.factor, self.seed)


def main(argv: Sequence[str]) -> int:
    parser = command_line("lenet", __doc__)
    parser.add_argument("--quick", action="store_true", help="6,000 images, few epochs, one seed")
    parser.add_argument("--data", choices=DATA, default="mnist")
    add_seeds(parser, usual="3, or 1 with --quick")
    parser.add_argument("--recipes", type=among(RECIPES), default=tuple(RECIPES), help=f"of {', '.join(RECIPES)}")
    add_report(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    protocol = replace(QUICK if given.quick else FULL, data=given.data)
    seeds = range(given.seeds or (1 if given.quick else 3))
    rows, failed = Rows(given.output / "lenet" / f"{protocol.label}.jsonl", Run), 0
    try:
        if not given.report:
            failed = search(protocol, given.recipes, seeds, rows)
    finally:
        write_page(given.output, f"lenet_{protocol.label}", report(protocol, seeds, rows.read()))
    return int(failed > 0)


def search(protocol: Protocol, recipes: Sequence[str], seeds: Sequence[int], rows: Rows[Run]) -> int:
    """Rung by rung for the recipes in turn, so that each has a figure early; returns how many runs failed."""
    wanted = [Job(DENSE, 1.0, seed) for seed in seeds]
    while wanted:
        failed = sweep(
            rows, missing(rows, wanted), partial(make_run, protocol), Console(),
            note=lambda run: f"{100 * run.validation:.2f}% in {run.seconds:.0f} s",
        )  # fmt: skip
        if failed:
            return failed  # what to try next depends on every run
        runs = [run for run, _ in rows.read()]
        rungs = {name: next_rung(name, runs, seeds, protocol.first) for name in recipes}
        wanted = [Job(name, factor, seed) for name, factor in rungs.items() if factor for seed in seeds]
    return 0


def next_rung(recipe: str, runs: Sequence[Run], seeds: Sequence[int], first: float) -> float | None:
    """The rung to try next; None when the ladder ends, or a rung that holds is next to one that does not."""
    at = LADDER.index(first)
    lost = points_lost(recipe, LADDER[at], runs, seeds)
    if lost is None:
        return LADDER[at]
    step = 1 if lost <= LOSS_POINTS else -1
    while 0 <= (at := at + step) < len(LADDER):
        beyond = points_lost(recipe, LADDER[at], runs, seeds)
        if beyond is None:
            return LADDER[at]
        if (beyond <= LOSS_POINTS) != (step > 0):
            return None
    return None


def points_lost(
    recipe: str, factor: float, runs: Sequence[Run], seeds: Sequence[int], split: str = "validation"
) -> float | None:
    """Mean percentage points under dense training of the same seeds; None when a run is missing."""
    lost = losses(recipe, factor, runs, split)
    return round(statistics.fmean(lost[seed] for seed in seeds), 6) if set(seeds) <= set(lost) else None


def losses(recipe: str, factor: float, runs: Sequence[Run], split: str) -> dict[int, float]:
    """Seed -> percentage points under its dense training, where both runs are there."""
    found = {(run.recipe, run.factor, run.seed): 100.0 * getattr(run, split) for run in runs}
    seeds = [run.seed for run in runs if (run.recipe, run.factor) == (recipe, factor)]
    both = [seed for seed in sorted(seeds) if (DENSE, 1.0, seed) in found]
    # 0.1 is 0.1, differences of floats or not
    return {seed: round(found[DENSE, 1.0, seed] - found[recipe, factor, seed], 6) for seed in both}


def make_run(protocol: Protocol, job: Job) -> Run:
    """One run, from its last epoch when it was stopped before."""
    recipe, factor, seed = job.recipe, job.factor, job.seed
    task = lenet_task(protocol, seed)
    trained(protocol, task, seed, protocol.start_epochs)  # not in any run's seconds
    start = time.process_time()
    model = trained(protocol, task, seed, protocol.start_epochs + (protocol.epochs if recipe == DENSE else 0))
    weights = take_inventory(model, task.example_inputs(1))
    if recipe != DENSE:
        teacher, plan = copy.deepcopy(model), LayerPlan(1.0 - 1.0 / factor, Choice("unstructured"))
        plans = Plan(dict.fromkeys(weights.names, plan))
        pruner = Pruner(model, weights, plans, task.calibration, task.loss)
        path = KEPT / f"{protocol.label}-{recipe}-{factor:g}-{seed}.training"
        train_(
            model, task.train, task.loss, replace(protocol.pruning, epochs=protocol.epochs), seed=seed,
            method=TRAINING.create(RECIPES[recipe]), pruner=pruner, teachers=[teacher], checkpoint=path,
        )  # fmt: skip
    left = sum(int(weight_of(model, name).count_nonzero()) for name in weights.names)
    reached = sum(layer.weights for layer in weights.layers) / left
    return Run(recipe, factor, seed, task.evaluate(model), task.test(model), reached, time.process_time() - start)


def lenet_task(protocol: Protocol, seed: int) -> Task:
    args = {"model": "lenet5", "widths": [20, 50, 500], "augment": DATA[protocol.data], "seed": seed}
    task = TASKS.create(Choice(protocol.data, args))
    if protocol.images is None:
        return task
    assert isinstance(task.train, TensorBatches)
    few = replace(task.train, x=task.train.x[: protocol.images], y=task.train.y[: protocol.images])
    return replace(task, train=few)


def trained(protocol: Protocol, task: Task, seed: int, epochs: int) -> nn.Module:
    """The model after `epochs` of dense training, from the cache where it was trained before."""
    model, path = copy.deepcopy(task.model), KEPT / f"{protocol.label}-{epochs}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(read_tensors(path, "the dense model")[0])
        return model
    settings = replace(protocol.start, epochs=epochs)
    train_(model, task.train, task.loss, settings, seed=seed, checkpoint=path.with_suffix(".training"))
    write_tensors(path, model.state_dict())
    return model


def report(protocol: Protocol, seeds: Sequence[int], found: Sequence[tuple[Run, Provenance | None]]) -> str:
    """The page, from the runs and where each was made."""
    runs, made = [run for run, _ in found], {run.key: at for run, at in found}
    machines = Machines(made.values())
    dense = [run for run in runs if run.recipe == DENSE and run.seed in seeds]
    tests = mean_and_spread([100 * run.test for run in dense], ".2f")
    rows, best = [], []
    for recipe in RECIPES:
        held = 0.0
        for factor in LADDER:
            lost = points_lost(recipe, factor, runs, seeds)
            held = factor if lost is not None and lost <= LOSS_POINTS else held
            mine = [run for run in runs if (run.recipe, run.factor) == (recipe, factor) and run.seed in seeds]
            of = [losses(recipe, factor, mine + dense, split) for split in ("validation", "test")]
            if of[0]:
                reached, seconds = (statistics.fmean(getattr(run, n) for run in mine) for n in ("reached", "seconds"))
                losts = (mean_and_spread(list(each.values()), "+.2f") for each in of)
                where = machines.cell(made[run.key] for run in mine)
                rows.append((recipe, f"{reached:.1f}x", str(len(of[0])), *losts, f"{seconds:.0f}", *where))
        if any(run.recipe == recipe for run in runs):
            best.append((recipe, f"{held:g}x" if held else MISSING))
    header = ("recipe", "times fewer weights", "seeds", "points lost, validation", "points lost, test", "processor s")
    images = f"{protocol.images:,} training images" if protocol.images else "all training images"
    images += ", shifted and mirrored at random" if DATA[protocol.data] else " as they are"
    quick = " --quick" if protocol.name == QUICK.name else ""
    return page(
        f"LeNet-5, {protocol.data}: compression at {LOSS_POINTS} point ({protocol.name})",
        f"lenet{quick} --data {protocol.data} --seeds {len(seeds)}",
        f"On {images}; "
        f"{protocol.start_epochs} dense epochs, then {protocol.epochs} of the recipe with that model as teacher; "
        f"dense: {protocol.start_epochs + protocol.epochs} epochs without a teacher. Single weights, one ranking "
        "of all layers by LAMP; means over the seeds, and deviations. Rungs are chosen on the validation split "
        "(5,000 images: one is 0.02 points).",
        f"Dense: {tests}% on the test split; seeds: {len(dense)}." if dense else "No dense run yet.",
        markdown_table(("recipe", f"highest tried that holds {LOSS_POINTS} (validation)"), best),
        markdown_table((*header, *machines.header), rows),
        "1 thread.",
        machines.legend(),
    )
