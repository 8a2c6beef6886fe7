"""Which sparsities and precisions lose least within a budget: a multiple-choice knapsack over measured curves.

Solved exactly, but for the rounding of the budget to buckets, by dynamic programming (HALP, Shen et al. 2022; SPDY,
Frantar and Alistarh 2022). A layer's curve may be weighed by a coefficient: what a single layer's curve says of its
share in a plan is only as true as pruned layers are independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from autoprune.envs.curves import GRID, SPARSITIES, Array, place
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.envs.projection import meet_limits
from autoprune.plan import Plan

BUCKETS = 500
LOSS_PER_SCORE = 3.0  # where a drop of the score is allowed: 0.01 of accuracy goes with about 0.03 of cross-entropy
_TIE = 1e-9  # a sparsity, or int8, that costs nothing is still more than none

Indices = NDArray[np.int64]


def solve(problem: Problem, partial: PartialPlan, greedily: bool = False) -> Plan:
    """The plan of `partial` with the sparsities that lose least on the problem's target, weighed by its coefficients.

    Where plans choose precisions, also with the precision of each layer that `partial` has not chosen. A target out of
    reach gives the plan that comes nearest. `greedily`: by always pruning further where the least loss buys a unit of
    the budget.
    """
    names, ways = problem.inventory.names, _ways(problem, partial)
    cost, weight, budget = _terms(problem, partial, ways)
    columns = columns_up_to(problem.max_sparsity)
    columns = np.concatenate([way * GRID + columns for way in range(len(ways))])
    choose = greedy if greedily else knapsack
    chosen = columns[choose(cost[:, columns], weight[:, columns], budget)]
    sparsities = {name: float(SPARSITIES[i % GRID]) for name, i in zip(names, chosen, strict=True)}
    solved = partial.plan.with_sparsities(sparsities)
    if len(ways) > 1:
        solved = solved.with_precisions(
            {name: ways[i // GRID].layers[name].precision for name, i in zip(names, chosen, strict=True)}
        )
    several = len(problem.limits) + (problem.required_speedup is not None) > 1  # the solver has one budget
    return meet_limits(solved, problem) if several and not problem.meets(solved) else solved


def weighed(problem: Problem, coefficients: Iterable[float]) -> Plan:
    """The solver's plan under a coefficient for every layer, in the inventory's order."""
    named = dict(zip(problem.inventory.names, map(float, coefficients), strict=True))
    return solve(problem, replace(PartialPlan.of(problem.uniform(0.0)), coefficients=named))


def _ways(problem: Problem, partial: PartialPlan) -> list[PartialPlan]:
    """The plans among whose layers the solver chooses: `partial` in each precision that it leaves open."""
    if len(problem.precisions) == 1:
        return [partial]
    names = partial.layers
    return [
        partial.with_precisions({name: partial.precisions.get(name, precision) for name in names})
        for precision in problem.precisions
    ]


def _terms(problem: Problem, partial: PartialPlan, ways: Sequence[PartialPlan]) -> tuple[Array, Array, float]:
    """What is made least, what has a budget, each (layers, ways * GRID), and the budget."""
    curves, target = problem.curves, problem.target
    coefficients = np.array([partial.coefficients.get(name, 1.0) for name in problem.inventory.names])
    loss = np.concatenate([curves.plan_mixed(way, partial.mix) for way in ways], axis=1) * coefficients[:, None]
    loss += _TIE * np.arange(loss.shape[1])
    ms = np.concatenate([curves.plan_ms(way) for way in ways], axis=1)
    if not target.limits:
        return ms, loss, (target.accuracy_drop or 0.0) * LOSS_PER_SCORE
    if problem.required_speedup is not None:
        parts_ms = problem.table.parts_ms(problem.table.dense_ms / problem.required_speedup)
        return loss, ms, parts_ms - curves.fixed_ms
    limit = problem.limits[0]
    names = problem.inventory.names
    costs = np.concatenate([limit.curves(way, names) for way in ways], axis=1)
    return loss, costs, limit.budget(names)


def columns_up_to(max_sparsity: float) -> Indices:
    """The sparsities a solver chooses from: 0, and finer where a step matters more."""
    last = place(max_sparsity)
    wanted = [0, *range(5, 50, 5), *range(50, 80, 2), *range(80, GRID)]
    return np.array(sorted({*(column for column in wanted if column <= last), last}), np.int64)


def knapsack(cost: Array, weight: Array, budget: float, buckets: int = BUCKETS) -> Indices:
    """One option a row so that the summed cost is least and the summed weight at most `budget`.

    Args:
        cost: (rows, options), finite.
        weight: (rows, options).
        budget: where not even the lightest options fit it, those are returned.
        buckets: the budget above the lightest options is cut into so many.
    """
    lightest = weight.min(axis=1)
    room = budget - float(lightest.sum())
    if room <= 0.0:
        return np.asarray(weight.argmin(axis=1), np.int64)
    unit = room / buckets
    taken = np.minimum(np.rint((weight - lightest[:, None]) / unit), buckets + 1).astype(np.int64)
    capacities = np.arange(buckets + 1)
    best = np.zeros(buckets + 1)
    choices = np.empty((len(cost), buckets + 1), np.int64)
    padded = np.full(2 * (buckets + 1), math.inf)
    shifted = sliding_window_view(padded, buckets + 1)  # row s: what is best with s - buckets - 1 buckets more
    for row in range(len(cost)):
        padded[buckets + 1 :] = best
        reached = shifted[buckets + 1 - taken[row]]
        reached += cost[row][:, None]
        choices[row] = reached.argmin(axis=0)
        best = reached[choices[row], capacities]
    for capacity in range(buckets, -1, -1):  # rounded weights may be a little over in truth
        chosen = _walk_back(choices, taken, capacity)
        if float(weight[np.arange(len(cost)), chosen].sum()) <= budget * (1.0 + 1e-9):
            return chosen
    return np.asarray(weight.argmin(axis=1), np.int64)


def _walk_back(choices: Indices, taken: Indices, capacity: int) -> Indices:
    chosen = np.empty(len(choices), np.int64)
    for row in range(len(choices) - 1, -1, -1):
        chosen[row] = choices[row, capacity]
        capacity -= int(taken[row, chosen[row]])
    return chosen


def greedy(cost: Array, weight: Array, budget: float) -> Indices:
    """From the option of least cost in each row, one step after another where a unit of weight costs least."""
    order = _by_cost(cost, weight)
    cost, weight = np.take_along_axis(cost, order, axis=1), np.take_along_axis(weight, order, axis=1)
    rows, options = cost.shape
    chosen = np.zeros(rows, np.int64)
    while float(weight[np.arange(rows), chosen].sum()) > budget:
        ahead = chosen + 1
        open_ = np.flatnonzero(ahead < options)
        if not len(open_):
            break
        dearer = cost[open_, ahead[open_]] - cost[open_, chosen[open_]]
        lighter = np.maximum(weight[open_, chosen[open_]] - weight[open_, ahead[open_]], 1e-12)
        chosen[open_[np.argmin(dearer / lighter)]] += 1
    return order[np.arange(rows), chosen]


def _by_cost(cost: Array, weight: Array) -> Indices:
    """The options of each row by rising cost; in the place of one that is no lighter, the lightest that costs less."""
    order = np.argsort(cost, axis=1, kind="stable")
    sorted_ = np.take_along_axis(weight, order, axis=1)
    lightest = np.minimum.accumulate(sorted_, axis=1)
    lighter = np.concatenate([np.ones((len(cost), 1), bool), lightest[:, 1:] < lightest[:, :-1]], axis=1)
    places = np.maximum.accumulate(np.where(lighter, np.arange(cost.shape[1]), 0), axis=1)
    return np.take_along_axis(order, places, axis=1)
