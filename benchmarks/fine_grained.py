"""Who finds the best recipe: the agent, random search, TPE, or a person, at equal training cost.

    python -m benchmarks fine_grained --quick                # the embedded digits: about half an hour
    python -m benchmarks fine_grained                        # Fashion-MNIST: two hours; stop it, and go on, at any time
    python -m benchmarks fine_grained --who ppo,random --seeds 1
    python -m benchmarks fine_grained --report               # the table again, from what is there

95% of the weights are cut, anywhere. What is searched is how: the training method, what shares the budget among the
layers, the schedule, the penalty, regrowth, the learning rate. Every trial trains the dense model by its recipe
for some steps and is scored on the validation split; then successive halving trains the best for longer, and the
best recipe trains the model to the end. The actions are laid out around the hand-set recipe, in the middle of every
list and range, so that an untrained policy starts from what a person would do. Distillation is left out: a step with a
teacher costs more than one without. The hand-set recipe spends no trials: it is shown trained for as long as the
others' last training (hand-set), and for as long as their trials and their last training together (hand-set-long).

The test split is read once a run, at its end. Runs are kept in benchmarks/results/fine_grained/ as they end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from autoprune.agents.halving import rungs
from autoprune.config import HalvingSection, parse_config
from autoprune.files import cache_folder
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.pipeline.run import Run
from autoprune.report.console import Console
from autoprune.report.table import markdown_table, mean_and_spread
from autoprune.training.loop import count_batches
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import Row, Rows, missing, seed_by_seed, sweep

SPARSITY = 0.95
HAND_SET = {"name": "gradual", "allocation": "erk"}
SETTINGS = {"learning_rate": 0.05, "weight_decay": 5e-4}
SEARCHERS = ("ppo", "random", "tpe")
HAND, HAND_LONGER = "hand-set", "hand-set-long"
WHO = (*SEARCHERS, HAND, HAND_LONGER)
# Around HAND_SET and SETTINGS: the zero action is that recipe.
ACTIONS: list[Any] = [
    {"name": "training_method", "names": ["one_shot", "adaptive", "gradual", "proximal", "thresholds"]},
    {"name": "allocation", "options": ["planned", "lamp", "erk", "global", {"name": "global", "normalise": True}]},
    {"name": "schedule_end", "low": 0.4, "high": 0.6},
    {"name": "schedule_exponent", "low": 1.0, "high": 9.0},
    {"name": "schedule_rounds", "low": 4, "high": 100},
    "penalty",
    "regrowth",
    {"name": "learning_rate", "low": 0.01, "high": 0.25},
]


@dataclass(frozen=True)
class Setup:
    """A task of the comparison.

    Attributes:
        task: of a config.
        episodes: trials of a search.
        steps: optimizer steps of a trial.
        halving: what follows.
        epochs: of the last training.
    """

    task: Mapping[str, Any]
    episodes: int
    steps: int
    halving: HalvingSection
    epochs: int


SETUPS: Mapping[str, Setup] = {
    "digits": Setup(
        {"name": "digits", "widths": [16, 32, 64]}, 24, 40, HalvingSection(plans=4, steps=80, factor=2), 12
    ),
    "fashion_mnist": Setup(
        {"name": "fashion_mnist", "widths": [8, 16, 32], "augment": False},
        24,
        60,
        HalvingSection(plans=4, steps=120, factor=2),
        3,
    ),
}


@dataclass(frozen=True)
class Outcome(Row):
    """One finished run; accuracies in [0, 1]."""

    who: str
    seed: int
    dense: float
    validation: float
    test: float
    zeros: float
    steps: int
    seconds: float
    recipe: str

    @property
    def key(self) -> tuple[int, str]:
        return self.seed, self.who


def main(argv: Sequence[str]) -> int:
    parser = command_line("fine_grained", __doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded digits")
    parser.add_argument("--who", type=among(WHO), default=tuple(WHO), help=f"of {', '.join(WHO)}")
    add_seeds(parser, 3)
    add_report(parser)
    given = parser.parse_args(argv)
    name = "digits" if given.quick else "fashion_mnist"
    rows, failed = Rows(given.output / "fine_grained" / f"{name}.jsonl", Outcome), 0
    try:
        if not given.report:
            torch.set_num_threads(1)
            wanted = missing(rows, seed_by_seed(given.seeds, given.who))
            failed = sweep(rows, wanted, partial(run, name), Console(), note=lambda row: f"{100 * row.test:.2f}%")
    finally:
        write_page(given.output, f"fine_grained_{name}", report(name, rows.read()))
    return int(failed > 0)


def run(name: str, key: tuple[int, str]) -> Outcome:
    """One search and its last training, or a hand-set recipe's; resumed where it was stopped."""
    setup, (seed, who) = SETUPS[name], key
    searched = who in SEARCHERS
    epochs = setup.epochs
    start = time.process_time()
    directory = cache_folder() / "benchmarks" / "fine_grained" / f"{name}-{who}-{seed}"
    trained = Run(parse_config(_config(setup, who, seed, epochs), name), directory)
    per_epoch = count_batches(trained.task.train)
    trials = setup.episodes * setup.steps + sum(
        rung.plans * rung.steps for rung in rungs(setup.halving.plans, setup.halving.steps, setup.halving.factor)
    )
    if who == HAND_LONGER:
        epochs += round(trials / per_epoch)
        trained = Run(parse_config(_config(setup, who, seed, epochs), name), directory)
    if not searched:
        trained.plan_uniformly()
    plan, model, inventory, dense = trained.plan, trained.masked, trained.prepared.inventory, trained.prepared.dense
    zeros = [sparsity(weight_of(model, layer)) * inventory[layer].weights for layer in inventory.names]
    recipe = {**plan.training.args, **plan.settings}
    return Outcome(
        who,
        seed,
        trained.task.test(dense),
        trained.task.evaluate(model),
        trained.task.test(model),
        sum(zeros) / sum(inventory[layer].weights for layer in inventory.names),
        epochs * per_epoch + trials * searched,
        time.process_time() - start,
        f"{plan.training.name}: " + ", ".join(f"{key} {value}" for key, value in sorted(recipe.items(), key=str)),
    )


def _config(setup: Setup, who: str, seed: int, epochs: int) -> dict[str, Any]:
    searched = who in SEARCHERS
    return {
        "seed": seed,
        "task": {**setup.task, "seed": seed},
        "target": {"sparsity": SPARSITY},
        "latency": {"samples": 5, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
        "env": {
            "pattern": "unstructured",
            "max_sparsity": 0.98,
            "min_saving": 0.0,
            "actions": ACTIONS,
            "recovery": {"name": "train", "steps": setup.steps},
        },
        "search": {
            "agent": who if searched else "random",
            "episodes": setup.episodes,
            "halving": setup.halving.model_dump(),
        },
        "finetune": {
            "method": "one_shot" if searched else HAND_SET,
            "settings": {"epochs": epochs, **SETTINGS},
        },
    }


def report(name: str, outcomes: Sequence[tuple[Outcome, Provenance | None]]) -> str:
    """The page, from the rows and where each was measured."""
    setup, rows, machines = SETUPS[name], [], Machines(made for _, made in outcomes)
    for who in WHO:
        mine = [outcome for outcome, _ in outcomes if outcome.who == who]
        if mine:
            figures = zip(*((each.validation, each.test, each.dense - each.test) for each in mine), strict=True)
            rows.append((
                who, str(len(mine)), *(mean_and_spread([100 * value for value in values]) for values in figures),
                f"{100 * statistics.mean(each.zeros for each in mine):.1f}%",
                f"{statistics.mean(each.steps for each in mine):.0f}",
                f"{statistics.mean(each.seconds for each in mine):.0f}",
            ))  # fmt: skip
    header = ("who", "seeds", "validation", "test", "points under dense", "zeros", "steps trained", "processor s")
    recipes = [
        (row.who, str(row.seed), f"{100 * row.test:.2f}", row.recipe, *machines.cell([made])) for row, made in outcomes
    ]
    halving, quick = setup.halving, " --quick" if name == "digits" else ""
    return page(
        f"Recipes for {100 * SPARSITY:g}% zeros, unstructured: {name}",
        f"fine_grained{quick}",
        f"{setup.episodes} trials of {setup.steps} steps, "
        f"successive halving from {halving.plans} plans of {halving.steps} steps, a last training of {setup.epochs} "
        "epochs. Accuracies in percent, mean ± standard deviation over the seeds; "
        "everything was chosen on the validation split. hand-set trains as long as the others' last training, "
        "hand-set-long as long as a whole search.",
        markdown_table(header, rows),
        "## What was found",
        markdown_table(("who", "seed", "test", "recipe", *machines.header), recipes, left=5),
        machines.legend(),
    )
