"""The solver against brute force, and what a plan made by it must be."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.envs import PruneEnv
from autoprune.envs.knapsack import greedy, knapsack, solve
from autoprune.envs.partial_plan import PartialPlan
from autoprune.registry import Choice
from autoprune.target import Target
from autoprune.testing import fake_problem

COEFFICIENT = (Choice("coefficient"),)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31), st.floats(0.1, 1.2))
def test_the_knapsack_is_no_worse_than_any_choice_that_fits_a_hair_tighter(
    rows: int, options: int, seed: int, share: float
) -> None:
    draws = np.random.default_rng(seed)
    cost, weight = draws.random((rows, options)), draws.random((rows, options))
    lightest, heaviest = weight.min(1).sum(), weight.max(1).sum()
    budget = lightest + share * (heaviest - lightest)
    at = np.arange(rows)
    chosen = knapsack(cost, weight, budget, buckets=2000)
    assert weight[at, chosen].sum() <= budget * (1 + 1e-9)
    tighter = budget - rows * (budget - lightest) / 2000
    fitting = [
        cost[at, picked].sum()
        for picked in map(np.array, itertools.product(range(options), repeat=rows))
        if weight[at, picked].sum() <= tighter
    ]
    assert cost[at, chosen].sum() <= min(fitting, default=math.inf) + 1e-9


def test_a_budget_out_of_reach_gives_the_lightest_options() -> None:
    cost, weight = np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[3.0, 1.0], [3.0, 2.0]])
    assert knapsack(cost, weight, 1.0).tolist() == [1, 1]
    assert greedy(cost, weight, 1.0).tolist() == [1, 1]


def test_greedy_takes_the_cheapest_step_first() -> None:
    cost, weight = np.array([[0.0, 1.0], [0.0, 0.1]]), np.array([[2.0, 1.0], [2.0, 1.0]])
    assert greedy(cost, weight, 3.0).tolist() == [0, 1]


@pytest.mark.parametrize("target", [Target(speedup=3.0), Target(sparsity=0.8), Target(accuracy_drop=0.05)])
def test_the_solver_s_plan_is_on_the_target_and_loses_no_more_than_uniform(target: Target) -> None:
    problem = fake_problem(target)
    env = PruneEnv(problem, COEFFICIENT)
    plan = env.solved()
    rows = [(problem.inventory.names.index(name), round(layer.sparsity * 100)) for name, layer in plan.layers.items()]
    lost = sum(problem.curves.loss[row, column] for row, column in rows)
    if target.speedup is not None:
        assert problem.table.predict_speedup(plan) >= target.speedup * (1 - 1e-9)
        alike = PruneEnv(problem)._start
        assert lost <= sum(
            problem.curves.loss[i, round(layer.sparsity * 100)] for i, layer in enumerate(alike.layers.values())
        )
    elif target.sparsity is not None:
        weights = {layer.name: layer.weights for layer in problem.inventory.layers}
        zeros = sum(weights[name] * layer.sparsity for name, layer in plan.layers.items())
        assert zeros >= target.sparsity * sum(weights.values()) * (1 - 1e-9)
    else:
        assert lost <= 0.05 * 3.0 * (1 + 1e-6)


def test_a_layer_that_counts_more_is_pruned_less() -> None:
    problem = fake_problem(Target(speedup=3.0))
    name = problem.inventory.names[2]
    partial = PartialPlan.of(problem.uniform(0.5))
    plain = solve(problem, partial)
    careful = solve(problem, replace(partial, coefficients={name: 50.0}))
    careless = solve(problem, replace(partial, coefficients={name: 0.02}))
    assert careful.layers[name].sparsity < plain.layers[name].sparsity < careless.layers[name].sparsity


def test_the_zero_action_of_coefficients_is_the_solver_s_plan() -> None:
    env = PruneEnv(fake_problem(Target(speedup=3.0)), COEFFICIENT)
    env.reset()
    for _ in range(env.steps_per_episode):
        *_, info = env.step(np.zeros(1, np.float32))
    planned = {name: layer["sparsity"] for name, layer in info["trial"]["plan"]["layers"].items()}
    assert planned == {name: layer.sparsity for name, layer in env.solved().layers.items()}


def test_the_uniform_rule_is_at_hand_whatever_guides_the_solver() -> None:
    env = PruneEnv(fake_problem(Target(speedup=3.0)), (Choice("mix"), Choice("coefficient"), Choice("criterion")))
    alike = env.alike()
    alike.reset()
    for _ in range(alike.steps_per_episode):
        *_, info = alike.step(np.zeros(len(alike.action_choices), np.float32))
    assert len({layer["sparsity"] for layer in info["trial"]["plan"]["layers"].values()}) == 1


def test_a_mix_of_curves_never_falls_and_is_the_loss_at_0() -> None:
    curves = fake_problem().curves
    assert np.array_equal(curves.mixed(0.0), curves.loss)
    for mix in (-1.0, -0.3, 0.4, 1.0):
        mixed = curves.mixed(mix)
        assert np.isfinite(mixed).all()
        assert (np.diff(mixed, axis=1) >= 0).all()
    assert curves.mixed(1.0) == pytest.approx(curves.error, abs=1e-4)
