"""The best of five fixed recipes by validation: a rival that spends whole trainings in the place of a search.

A plan names its training as well as its layers, so an entrant that varies both returns a plan like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoprune.allocation import ALLOCATIONS, Layers
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.rewards import terminal_reward
from autoprune.evaluation.measurement import Evaluate
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.recovery.finetune import budget_cost
from autoprune.masks import score_layers
from autoprune.pipeline.outcomes import FIVE_RECIPES, UNASKED, Outcome
from autoprune.pipeline.yardstick import OnTarget, Trained, Yardstick, at_speedup
from autoprune.plan import Plan
from autoprune.registry import Choice

KNAPSACK, UNIFORM = "knapsack", "uniform"


@dataclass(frozen=True)
class Recipe:
    """A rule that makes a plan, and how the plan is trained.

    Attributes:
        rule: ``uniform``, ``knapsack``, or an allocation that shares the uniform plan's milliseconds.
        training: the method; it keeps the plan's sparsities, so that the speed-up stays as measured.
    """

    rule: str
    training: Choice


FIVE = (
    Recipe(UNIFORM, Choice("gradual")),
    Recipe("erk", Choice("gradual")),
    Recipe("lamp", Choice("gradual")),
    Recipe(KNAPSACK, Choice("gradual")),
    Recipe(KNAPSACK, Choice("one_shot")),
)


def plan_of(recipe: Recipe, env: PruneEnv, subject: Subject) -> Plan:
    """The recipe's plan, on the target by the latency table.

    Args:
        recipe: a rule and a training.
        env: the problem, as episodes; the target is a speed-up.
        subject: the dense model, with the latency table where its budget is latency.

    Raises:
        ConfigError: the layers' pattern has one sparsity alone, which no rule can change.
    """
    problem = env.problem
    if recipe.rule == KNAPSACK:
        plan = env.solved()
    else:
        plan = _uniform(problem)
        if recipe.rule != UNIFORM:
            plan = _shared(plan, problem, recipe.rule, subject)
    return replace(plan, training=recipe.training)


def _uniform(problem: Problem) -> Plan:
    """Every layer alike; `at_speedup` moves it the rest of the way."""
    wanted, low, high = problem.required_speedup or 1.0, 0.0, problem.max_sparsity
    for _ in range(20):
        middle = (low + high) / 2
        fast = problem.table.predict_speedup(problem.uniform(middle)) >= wanted
        low, high = (low, middle) if fast else (middle, high)
    return problem.uniform(high)


def _shared(plan: Plan, problem: Problem, allocation: str, subject: Subject) -> Plan:
    """The plan's budget, shared by an allocation among its layers."""
    inventory = problem.inventory
    saliency = score_layers(subject.dense, inventory, plan, subject.statistics)
    layers = Layers(inventory, plan, saliency, budget_cost(subject, plan)(inventory))
    shares = ALLOCATIONS.create(Choice(allocation)).sparsities(layers)
    return plan.with_sparsities({name: min(problem.max_sparsity, share) for name, share in shares.items()})


def best_of_five(name: str, env: PruneEnv, subject: Subject, measure: Evaluate, yardstick: Yardstick) -> list[Outcome]:
    """Puts the five plans on the target, trains each to the end, and takes the best on the validation split.

    Its trials, seconds and steps are those of all trainings.

    Args:
        name: of the task.
        env: the problem, as episodes; the target is a speed-up.
        subject: the dense model; with the latency table where its budget is latency.
        measure: plan -> a measurement with the clock.
        yardstick: trains.

    Returns:
        The outcome; none where no recipe came to a trained model.

    Raises:
        ConfigError: the layers' pattern has one sparsity alone.
    """
    trained: list[tuple[Trained, OnTarget]] = []
    for recipe in FIVE:
        found = at_speedup(env.problem, plan_of(recipe, env, subject), measure)
        if found is not None:
            trained.append((yardstick.train(found.plan), found))
    done = [(row.validation, found) for row, found in trained if row.validation is not None]
    if not done:
        return []
    _, best = max(done, key=lambda each: each[0])
    reward = terminal_reward(env.problem, best.measurement).total
    rows = {row.plan: row for row, _ in trained}.values()  # recipes that come to one plan train it once
    spent = (sum(row.seconds for row in rows), len(rows), sum(row.steps for row in rows))
    figures = (reward, best.measurement.score, best.measurement.speedup, reward)
    return [Outcome(name, FIVE_RECIPES, 0, UNASKED, *figures, *spent, best.plan.to_json())]
