"""Problems that a training is steered on: of a task by its name, or at a sparsity where something is at stake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from autoprune.allocation import MacsCost
from autoprune.checks import check_numbers
from autoprune.envs.steer import STEPS, SteerEnv, SteerProblem
from autoprune.errors import ConfigError, NumericalError
from autoprune.evaluation.dense import dense_model, dense_settings
from autoprune.model.inventory import take_inventory
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT, Progress
from autoprune.registration import STEER_ID
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.tasks import TASKS
from autoprune.training.recipes import recipe_for
from autoprune.training.steering import SLICES

GROUP = Choice("group", {"size": 8})
LEAST, MOST = 0.02, 0.05  # of the score, what the best fixed schedule loses where something is at stake
DENSEST, SPARSEST = 0.3, 0.002  # densities among which such a target is looked for
HALVINGS = 7
CHOOSING_SEED = 1_000_000  # of the trainings that choose a target: none that episodes draw


# long: a parameter is a keyword of gymnasium.make, and is explained here
def steer_env(
    problems: Sequence[SteerProblem] | SteerProblem | None = None,
    *,
    task: str | Mapping[str, Any] | None = None,
    sparsity: float = 0.95,
    budget: Literal["weights", "macs"] = "weights",
    pattern: str | Mapping[str, Any] | Choice = GROUP,
    criterion: str | Mapping[str, Any] | Choice = "magnitude",
    dense: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    stake: float = 0.03,
    slices: int = SLICES,
    steps: int = STEPS,
    seeds: int = 4,
    shaping: float = 0.1,
) -> SteerEnv:
    """The environment of steered trainings of a task, or of problems that are there.

    The dense model is trained when it is first needed and kept in the user's cache; that is said on stderr.

    Args:
        problems: in place of `task`, and of all that says what the problem is.
        task: the name of a task, or a table of one and its arguments: ``{"name": "digits", "model": "mlp"}``.
        sparsity: of every prunable layer, in (0, 1): the target is what the plan then costs.
        budget: what the target counts: the weights left, or the multiply-adds.
        pattern: which weights are cut together, by name or with arguments; groups of 8 filters when left out.
        criterion: how important a weight is, likewise.
        dense: settings of the dense training that differ from the task's own.
        settings: of the steered training that differ from the recipe for such a model, e.g.
            ``{"distillation_weight": 0.5}``, which makes the dense model a teacher.
        stake: of the score, what a reward of 1 is worth.
        slices: of `SteerEnv`, likewise the following.
        steps: optimizer steps of a slice.
        seeds: of trainings.
        shaping: 0 or more.

    Raises:
        ConfigError: neither problems nor a task are given, or both; or something that cannot be used.
    """
    if (problems is None) == (task is None):
        raise ConfigError(
            f'{STEER_ID} needs a task or problems, one of them: gymnasium.make("{STEER_ID}", task="digits").'
        )
    if problems is None:
        assert task is not None
        choice = Choice.of(task)
        layer = LayerPlan(0.0, Choice.of(pattern), Choice.of(criterion))
        problems = steer_problem(choice.name, choice, layer, dense=dense, settings=settings, progress=Console())
        problems = at_sparsity(replace(problems, stake=_stake(stake), cost=_cost(problems, budget)), sparsity)
    return SteerEnv(problems, slices, steps, seeds, shaping)


def _stake(stake: float) -> float:
    check_numbers(STEER_ID, {"stake": stake}, 0.0, ends="(]")
    return stake


def _cost(problem: SteerProblem, budget: str) -> MacsCost | None:
    if budget not in ("weights", "macs"):
        raise ConfigError(f"{STEER_ID}: budget is weights or macs, not {budget!r:.60}.")
    return MacsCost(problem.inventory) if budget == "macs" else None


def steer_problem(
    name: str,
    choice: Choice,
    layer: LayerPlan,
    *,
    dense: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> SteerProblem:
    """The problem of a task, its dense model trained, with a plan that has every layer alike.

    Args:
        name: of the problem.
        choice: the task.
        layer: the plan of each layer.
        dense: of the dense training, what differs from the task's own settings.
        settings: of the steered training, what differs from the recipe for such a model.
        seed: of the dense training.
        progress: where the training is shown.

    Raises:
        ConfigError: the task, the pattern or a setting is unknown, or out of range; or the pattern allows one sparsity
            alone, so that there is nothing to steer.
    """
    if not PATTERNS.create(layer.pattern).any_sparsity:
        raise ConfigError(f"the pattern {layer.pattern} allows one sparsity alone: there is nothing to steer to.")
    task = TASKS.create(choice)
    model = dense_model(task, choice, dense_settings(task, dense or {}), seed, progress)
    inventory = take_inventory(model, task.example_inputs(1))
    plan = Plan(dict.fromkeys(inventory.names, layer))
    return SteerProblem(name, task, model, inventory, plan, recipe_for(model).changed(settings or {}))


def at_sparsity(problem: SteerProblem, sparsity: float) -> SteerProblem:
    """The problem with every layer planned at this sparsity."""
    check_numbers(STEER_ID, {"sparsity": sparsity}, 0.0, 1.0, "()")
    plan = problem.plan.with_sparsities(dict.fromkeys(problem.plan.layers, sparsity))
    return replace(problem, plan=plan, fixed={})


def at_stake(problem: SteerProblem, slices: int, steps: int) -> tuple[float, float] | None:
    """The sparsity at which the best fixed schedule loses `LEAST` to `MOST`, and that loss; None where none is found.

    The trainings that tell have a seed that no episode draws.
    """
    dense, sparse = DENSEST, SPARSEST
    for _ in range(HALVINGS):
        density = (dense * sparse) ** 0.5
        try:
            scores = at_sparsity(problem, 1.0 - density).fixed_scores(slices, steps, CHOOSING_SEED)
            lost = problem.dense_score - max(scores.values())
        except NumericalError:
            lost = 1.0
        if LEAST <= lost <= MOST:
            return 1.0 - density, lost
        if lost < LEAST:
            dense = density
        else:
            sparse = density
    return None
