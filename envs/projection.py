"""Projection: a budget is met by moving a plan onto it, not by punishing the agent for missing it.

All sparsities are shifted together in logit space, which keeps their order and their spread, until the latency
table says that the plan just meets the target; then every layer that its sparsity would not make faster is
given its weights back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from autoprune.envs.curves import GRID
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError, InfeasibleTarget
from autoprune.latency.table import LatencyTable
from autoprune.patterns import PATTERNS
from autoprune.plan import Plan
from autoprune.precision import OfLayer
from autoprune.registry import Choice

_EDGE = 0.005
_STEPS = 14  # halvings of the shift's interval: finer than the grid


def logit(sparsity: float) -> float:
    inside = min(max(sparsity, _EDGE), 1.0 - _EDGE)
    return math.log(inside / (1.0 - inside))


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def shift(plan: Plan, amount: float, max_sparsity: float, grid: int = GRID) -> Plan:
    """Moves every sparsity by `amount` in logit space; results are multiples of 1 / grid, in [0, max_sparsity]."""
    moved = {
        name: min(max_sparsity, round(sigmoid(logit(layer.sparsity) + amount) * grid) / grid)
        for name, layer in plan.layers.items()
    }
    return plan.with_sparsities(moved)


def release_useless(plan: Plan, table: LatencyTable) -> Plan:
    """Gives a layer its weights back where the table shows no gain from its sparsity, and float32 to one without int8.

    Of layers that can be int8 the precision stays: beside others in int8 it saves what no layer's own curve shows.
    """
    dense = {
        name: 0.0
        for name, layer in plan.layers.items()
        if layer.sparsity > 0
        and table.layer_us(name, layer.curve, layer.sparsity) >= table.layer_us(name, layer.curve, 0.0) * 0.995
    }
    plain: dict[str, OfLayer] = {
        name: "float32"
        for name, layer in plan.layers.items()
        if layer.precision == "int8" and not table.layers[name].is_int8(layer.pattern)
    }
    return plan.with_sparsities(dense).with_precisions(plain)


def fastest(plan: Plan, table: LatencyTable, max_sparsity: float) -> float:
    """The best speed-up the table predicts for this plan's patterns: `max_sparsity` everywhere."""
    return table.predict_speedup(plan.with_sparsities(dict.fromkeys(plan.layers, max_sparsity)))


def meet(plan: Plan, table: LatencyTable, speedup: float, max_sparsity: float) -> Plan:
    """The least common shift of `plan` that the table predicts to reach `speedup`.

    Where even `max_sparsity` everywhere is too slow, that plan is returned: as near as these patterns come.
    """
    return _least_shift(plan, max_sparsity, lambda moved: table.predict_speedup(moved) >= speedup)


def meet_limits(plan: Plan, problem: Problem) -> Plan:
    """The least common shift of `plan` that keeps every limit of the problem; as far as it goes where none does."""
    sparsity = problem.target.sparsity
    if problem.target.limits == ("sparsity",) and all(layer.sparsity == sparsity for layer in plan.layers.values()):
        return plan  # exactly that, which need not be on the grid
    return _least_shift(plan, problem.max_sparsity, problem.meets)


def _least_shift(plan: Plan, max_sparsity: float, enough: Callable[[Plan], bool]) -> Plan:
    """`plan` moved by the least common shift that is enough; as far as it goes where none is."""
    low, high = -12.0, 12.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(shift(plan, middle, max_sparsity)) else (middle, high)
    return shift(plan, high, max_sparsity)


def project(plan: Plan, problem: Problem) -> Plan:
    """Moves a plan onto the problem's limits and gives useless sparsity back."""
    return freed(meet_limits(plan, problem), problem)


def freed(plan: Plan, problem: Problem) -> Plan:
    """`release_useless`, where the clock alone counts: other limits are kept by zeros that save no time, too."""
    return plan if problem.limits else release_useless(plan, problem.table)


def check_movable(pattern: Choice) -> None:
    """Raises ConfigError on a pattern that allows one sparsity alone: there is nothing to move."""
    if not PATTERNS.create(pattern).any_sparsity:
        raise ConfigError(
            f"pattern {pattern} allows one sparsity alone, so that it cannot be put on a speed-up: ask for a sparsity."
        )


def check_feasible(reachable: float, speedup: float, baseline: str, max_sparsity: float) -> None:
    """Raises InfeasibleTarget, with the best `reachable` figure, when a speed-up over a baseline is out of reach."""
    if reachable < speedup:
        raise InfeasibleTarget(
            f"no plan reaches {speedup:.4g}x over {baseline}: with every layer at sparsity "
            f"{max_sparsity:g} the measured latency table predicts {reachable:.2f}x at best. Ask for less, {ALLOW_MORE}"
        )


ALLOW_MORE = "allow a higher sparsity (env.max_sparsity), or let more layers be pruned."


def check_limits(problem: Problem) -> None:
    """Raises InfeasibleTarget, with the best reachable figure, when even `max_sparsity` everywhere breaks a limit."""
    plans = [replace(problem, layer_precision=each).uniform(problem.max_sparsity) for each in problem.precisions]
    if (sparsity := problem.target.sparsity) is not None and sparsity > problem.max_sparsity:
        raise InfeasibleTarget(
            f"no plan has {100 * sparsity:g}% zeros: a layer may have {100 * problem.max_sparsity:g}% at most. Ask for "
            "less, or allow more (env.max_sparsity)."
        )
    for limit in problem.limits:
        if limit.name != "sparsity" and not any(map(limit.keeps, plans)):
            raise InfeasibleTarget(
                f"no plan keeps target.{limit.name} = {limit.at_most:,.0f}: with every layer at sparsity "
                f"{problem.max_sparsity:g} it is about {min(map(limit.cost, plans)):,.0f}. Allow more than "
                f"that, {ALLOW_MORE}"
            )
