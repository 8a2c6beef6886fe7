"""Putting a plan on its target by measurement, and saying before any work what is in reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.envs.limits import limits_of
from autoprune.envs.problem import Problem
from autoprune.envs.projection import project
from autoprune.errors import AutopruneError, InfeasibleTarget
from autoprune.pipeline.baselines import Baselines, DenseEngines
from autoprune.pipeline.correction import (
    HIGHEST,
    MEASUREMENTS,
    STEP,
    Corrected,
    check_reachable,
    check_reached,
    correct,
    free_without_pruning,
    further,
)
from autoprune.pipeline.gauge import Reached
from autoprune.plan import Plan
from autoprune.target import Target
from autoprune.testing import fake_problem

PROBLEM = fake_problem()


def asked(speedup: float) -> Problem:
    return PROBLEM.at(speedup)


def measured(problem: Problem, power: float, bias: float) -> Callable[[Plan], Reached]:
    """A machine on which models are faster than the table says, the more the faster they are."""
    speedup = problem.target.speedup
    assert speedup is not None

    def reached(plan: Plan) -> Reached:
        truth = bias * problem.table.predict_speedup(plan) ** power
        return Reached({"speedup": truth / speedup}, speedup=truth)

    return reached


def reachable(problem: Problem, power: float, bias: float) -> float:
    return float(bias * problem.table.predict_speedup(problem.uniform(problem.max_sparsity)) ** power)


@given(share=st.floats(0.15, 0.85), power=st.floats(0.8, 1.3), bias=st.floats(0.8, 1.3))
@settings(max_examples=40, deadline=None)
def test_a_corrected_plan_is_on_the_target(share: float, power: float, bias: float) -> None:
    least = bias * PROBLEM.table.predict_speedup(PROBLEM.uniform(0.0)) ** power
    problem = asked(max(1.01, least + share * (reachable(PROBLEM, power, bias) - least)))
    start = project(problem.uniform(0.5), problem)
    corrected = correct(start, measured(problem, power, bias), problem)
    assert corrected.measurements <= 2 * MEASUREMENTS
    assert corrected.reached.least >= 1.0
    assert corrected.reached.least <= HIGHEST or all(x.sparsity <= 0.1 for x in corrected.plan.layers.values())


def in_steps(problem: Problem, steps: Mapping[str, tuple[float, float]]) -> Callable[[Plan], Reached]:
    """A machine on which a layer, above a sparsity, makes the model faster by a factor at once, and slowly below it."""
    speedup = problem.target.speedup
    assert speedup is not None

    def reached(plan: Plan) -> Reached:
        truth = math.prod(
            (1.0 + 0.1 * layer.sparsity) * (factor if layer.sparsity >= at else 1.0)
            for name, (at, factor) in steps.items()
            for layer in [plan.layers[name]]
        )
        return Reached({"speedup": truth / speedup}, speedup=truth)

    return reached


def test_where_layers_become_faster_at_one_amount_they_are_moved_one_at_a_time() -> None:
    problem = asked(1.4)
    names = problem.inventory.names
    machine = in_steps(problem, dict.fromkeys(names[:3], (0.5, 1.3)))
    corrected = correct(problem.uniform(0.7), machine, problem)
    assert 1.0 <= corrected.reached.least <= HIGHEST
    assert corrected.remark is None
    # by one amount there is nothing between one layer's step and those of all three
    alike = [machine(problem.uniform(sparsity / 1000)).least for sparsity in range(950)]
    assert not any(1.0 <= least <= HIGHEST for least in alike)


def test_a_plan_between_whose_steps_the_target_lies_says_so() -> None:
    problem = asked(1.3)
    machine = in_steps(problem, {problem.inventory.names[0]: (0.5, 1.6)})
    corrected = correct(problem.uniform(0.7), machine, problem)
    assert corrected.reached.least > HIGHEST
    assert corrected.remark is not None
    assert f"{100 * (corrected.reached.least - 1):.0f}% above" in corrected.remark
    assert corrected.plan.layers[problem.inventory.names[0]].sparsity == pytest.approx(0.5, abs=STEP)


def test_a_plan_on_the_target_is_left_alone() -> None:
    problem = asked(3.0)
    start = project(problem.uniform(0.5), problem)
    corrected = correct(start, measured(problem, 1.0, 1.0), problem)
    assert corrected.plan == start
    assert corrected.measurements == 1


def test_of_plans_that_all_miss_the_nearest_is_kept() -> None:
    problem = asked(3.0)
    start = project(problem.uniform(0.5), problem)
    corrected = correct(start, measured(problem, 1.0, 0.1), problem)
    assert corrected.reached.least < 1.0
    assert corrected.reached.least >= measured(problem, 1.0, 0.1)(start).least


@given(lost=st.floats(0.8, 0.97), power=st.floats(0.8, 1.3))
@settings(max_examples=20, deadline=None)
def test_a_plan_is_moved_by_what_its_training_lost(lost: float, power: float) -> None:
    problem = asked(3.0)
    untrained = measured(problem, power, 1.0)
    plan = correct(project(problem.uniform(0.5), problem), untrained, problem).plan
    moved = further(plan, Reached({"speedup": lost * untrained(plan).least}), untrained, problem)
    assert 1.0 <= lost * untrained(moved.plan).least <= HIGHEST


def test_a_plan_that_cannot_be_moved_onto_the_target_is_refused_before_the_training() -> None:
    problem = asked(3.0)
    plan = project(problem.uniform(0.5), problem)
    check_reached(Corrected(plan, Reached({"speedup": 0.98}, speedup=2.94), 3), problem)
    with pytest.raises(InfeasibleTarget, match=r"measured 2\.40x as fast\. Ask for at most 2\.22x"):
        check_reached(Corrected(plan, Reached({"speedup": 0.8}, speedup=2.4), 3), problem)
    timed = Corrected(plan, Reached({"latency_ms": 0.5, "speedup": 1.2}, latency_ms=2.0, speedup=2.4), 3)
    with pytest.raises(InfeasibleTarget, match=r"Ask for at least 2\.16 ms"):
        check_reached(timed, replace(problem, target=Target(speedup=2.0, latency_ms=1.0)))


def test_the_refusal_names_a_figure_that_then_holds() -> None:
    bias = 0.7
    problem = asked(PROBLEM.table.predict_speedup(PROBLEM.uniform(0.95)) * 0.95)
    most = [problem.uniform(problem.max_sparsity)]
    with pytest.raises(InfeasibleTarget, match=r"Ask for at most ([\d.]+)x") as refusal:
        check_reachable(problem, most, measured(problem, 1.0, bias))
    figure = float(str(refusal.value).split("at most ")[1].split("x")[0])
    again = asked(figure)
    assert check_reachable(again, most, measured(again, 1.0, bias)) == 1.0
    corrected = correct(project(again.uniform(0.5), again), measured(again, 1.0, bias), again)
    assert corrected.reached.least >= 1.0


def test_what_only_the_clock_finds_in_reach_is_not_refused() -> None:
    problem = asked(PROBLEM.table.predict_speedup(PROBLEM.uniform(0.95)) * 1.1)
    most = [problem.uniform(problem.max_sparsity)]
    bias = check_reachable(problem, most, measured(problem, 1.0, 1.3))
    assert bias == pytest.approx(1.3)
    stretched = replace(problem, table=problem.table.scaled(bias))
    assert stretched.table.predict_speedup(most[0]) >= (problem.required_speedup or 0.0)


@pytest.mark.parametrize(
    ("target", "free"),
    [
        (Target(speedup=1.4), True),
        (Target(speedup=1.6), False),
        (Target(speedup=2.9, over="eager"), True),
        (Target(speedup=3.1, over="eager"), False),
        (Target(speedup=1.1, over="repacked"), False),
        (Target(latency_ms=1.1), True),
        (Target(latency_ms=0.9), False),
        (Target(size_bytes=390_000), False),
        (Target(size_bytes=410_000), True),
        (Target(speedup=1.4, size_bytes=390_000), False),
        (Target(sparsity=0.5), False),
        (Target(accuracy_drop=0.01), False),
        (Target(speedup=1.4, sparsity=0.5), False),
    ],
)
def test_what_repacking_alone_gives_is_not_pruned_for(target: Target, free: bool) -> None:
    speedups = {"eager": 1.0, "onnxruntime": 2.0, "repacked": 3.0}
    baselines = Baselines("onnxruntime", {"eager": 3.0, "onnxruntime": 1.5, "repacked": 1.0}, speedups, 400_000, {})
    file = baselines.file_size(sum(layer.weights for layer in PROBLEM.inventory.layers), 32)
    limits = limits_of(target, PROBLEM.inventory, file)
    found = free_without_pruning(target, limits, PROBLEM.uniform(0.0), baselines)
    assert (found is not None) == free


def test_an_engine_that_is_gone_is_named_with_what_to_do() -> None:
    engines = DenseEngines({"eager": lambda: None}, {"openvino": "pip install openvino."}, None, 0.0)  # type: ignore[arg-type]
    assert engines.call("eager", Path("baselines.json"))() is None
    with pytest.raises(
        AutopruneError, match=r"over openvino.*runs/a/baselines.json.*: pip install openvino\. .*delete"
    ):
        engines.call("openvino", Path("runs/a/baselines.json"))


@pytest.mark.parametrize("figures", [{"sparsity": 0.83}, {"macs": 200_000}, {"size_bytes": 40_000}])
def test_limits_that_add_up_are_kept_exactly(figures: dict[str, float]) -> None:
    problem = replace(PROBLEM, target=Target(**figures))  # type: ignore[arg-type]
    plan = project(problem.uniform(0.5), problem)
    (limit,) = problem.limits
    assert limit.cost(plan) <= limit.at_most * (1 + 1e-9)
    slower = plan.with_sparsities({name: max(0.0, x.sparsity - 0.03) for name, x in plan.layers.items()})
    assert limit.cost(slower) > limit.at_most


def test_a_measured_speed_up_is_shown_over_what_the_targets_is_over() -> None:
    asked_for = replace(PROBLEM, target=Target(speedup=1.5), baseline_speedup=2.0)
    assert asked_for.speedup_text(3.3) == "1.65x over the best dense engine"
    assert replace(PROBLEM, target=Target(latency_ms=1.0), baseline_speedup=2.0).speedup_text(3.3) == (
        "3.30x over dense torch eager"
    )


def test_several_limits_hold_at_once() -> None:
    problem = replace(PROBLEM, target=Target(speedup=2.0, sparsity=0.9, over="eager"))
    plan = project(problem.uniform(0.5), problem)
    assert problem.meets(plan)
    assert problem.limits[0].keeps(plan)
    assert problem.table.predict_speedup(plan) >= 2.0
