"""Agents are judged by the test score after training, and cheap scores by how well they foretell it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from autoprune.config import parse_config
from autoprune.errors import ConfigError, NumericalError
from autoprune.evaluation.recovery import RECOVERIES
from autoprune.evaluation.recovery.finetune import budget_cost, finetune_
from autoprune.pipeline import application
from autoprune.pipeline.compare import TaskComparison, compare_run, jobs_of, report
from autoprune.pipeline.judgement import (
    FEWEST,
    WHOLE,
    Judgement,
    correlation_table,
    rank_correlation,
    trained_table,
)
from autoprune.pipeline.outcomes import FIVE_RECIPES, Outcome, OutcomeLog
from autoprune.pipeline.recipes import FIVE, KNAPSACK, UNIFORM, plan_of
from autoprune.pipeline.run import Run
from autoprune.pipeline.yardstick import CheapScore, Trained, recoveries_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.testing import FakeClock, save_fake_table

SMALL: dict[str, Any] = {
    "task": {"name": "digits", "widths": [4, 8]},
    "dense": {"epochs": 1, "learning_rate": 0.1},
    "target": {"speedup": 1.5, "over": "eager"},
    "latency": {"samples": 3, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
    "env": {"actions": ["coefficient"], "min_saving": 0.0, "timing": "table", "recovery": "batch_norm"},
    "finetune": {"settings": {"epochs": 1, "learning_rate": 0.05}},
}
AGENTS = [Choice("knapsack"), Choice("random"), Choice(FIVE_RECIPES)]


def comparison_in(folder: Path, **changed: Any) -> TaskComparison:
    run = Run(parse_config({**SMALL, **changed}, "test"), folder, clock=FakeClock(2.0**-10))
    if not (folder / "latency.json").exists():
        save_fake_table(run)
    return TaskComparison("t", run, run.search.env, OutcomeLog(folder / "outcomes.jsonl"), folder / "judged")


def held(comparison: TaskComparison, *, finetune: bool = True) -> Judgement:
    return comparison.hold(jobs_of(AGENTS, 2, (1, 3)), finetune=finetune, evaluations=3)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskComparison, Judgement]:
    """A comparison on a toy task, with what it came to; made once."""
    comparison = comparison_in(tmp_path_factory.mktemp("yardstick") / "run")
    found = held(comparison)
    comparison.run.lock.close()
    return comparison, found


def plan_in(outcome: Outcome) -> Plan:
    assert outcome.plan is not None
    return Plan.from_json(outcome.plan)


@pytest.mark.slow
def test_every_plan_of_the_last_checkpoint_is_trained_once_and_scored_under_every_recovery(
    judged: tuple[TaskComparison, Judgement],
) -> None:
    comparison, found = judged
    last = [each for each in found.outcomes if each.evaluations in (0, 3)]
    assert [(each.agent, each.seed) for each in last] == [
        ("knapsack", 0),
        ("random", 0),
        ("random", 1),
        (FIVE_RECIPES, 0),
    ]
    keys = [each.plan for each in found.trained]
    assert len(set(keys)) == len(keys)
    assert {plan_in(each).key for each in last} <= set(keys)
    assert all(row.test is not None and row.speedup is not None and row.failed is None for row in found.trained)
    assert not list((comparison.folder / "training").glob("*")), "models of trained plans are not needed any more"
    scored = {plan_in(each).key for each in last}
    names = [str(each) for each in recoveries_of(Choice("batch_norm"), Plan({}))]
    assert sorted((each.plan, each.recovery) for each in found.scores) == sorted((p, n) for p in scored for n in names)
    assert [each.steps for each in found.scores if each.recovery == "train(steps=100)"] == [100] * len(scored)


@pytest.mark.slow
def test_the_score_is_that_of_the_fine_tuned_model(judged: tuple[TaskComparison, Judgement], tmp_path: Path) -> None:
    """By hand: the same plan trained by the run's own stage."""
    comparison, found = judged
    plan = plan_in(next(each for each in found.outcomes if each.agent == "knapsack"))
    context = replace(comparison.run.context, directory=tmp_path)
    model = application.AppliedPlan(context, comparison.run.preparation, plan).fine_tuned.model
    row = next(each for each in found.trained if each.plan == plan.key)
    assert comparison.run.task.test(model) == pytest.approx(row.test)
    assert comparison.run.task.evaluate(model) == pytest.approx(row.validation)


@pytest.mark.slow
def test_five_recipes_return_the_plan_and_the_training_that_are_best_on_validation(
    judged: tuple[TaskComparison, Judgement],
) -> None:
    _, found = judged
    outcome = next(each for each in found.outcomes if each.agent == FIVE_RECIPES)
    rows = found.trained[: outcome.trials]  # the entrant came before the plans were judged
    assert 2 <= len(rows) <= len(FIVE)
    best = max(rows, key=lambda row: -1.0 if row.validation is None else row.validation)
    assert plan_in(outcome).key == best.plan
    assert outcome.steps == sum(row.steps for row in rows) == len(rows) * rows[0].steps > 0
    assert outcome.seconds == pytest.approx(sum(row.seconds for row in rows))
    assert plan_in(outcome).training in {recipe.training for recipe in FIVE}


@pytest.mark.slow
def test_the_rules_of_the_recipes_spend_the_same(judged: tuple[TaskComparison, Judgement]) -> None:
    comparison, _ = judged
    env, subject = comparison.env, comparison.run.preparation.evaluator.subject
    plans = {recipe.rule: plan_of(recipe, env, subject) for recipe in FIVE}
    assert len({json.dumps(plan.to_json()["layers"]) for plan in plans.values()}) == len(plans) == 4
    for rule in (UNIFORM, KNAPSACK):
        assert env.problem.table.predict_speedup(plans[rule]) >= 1.5
    assert len({layer.sparsity for layer in plans[UNIFORM].layers.values()}) == 1
    cost = budget_cost(subject, plans[UNIFORM])(env.problem.inventory)
    budget = cost({name: layer.sparsity for name, layer in plans[UNIFORM].layers.items()})
    for rule in ("erk", "lamp"):
        spent = cost({name: layer.sparsity for name, layer in plans[rule].layers.items()})
        assert spent == pytest.approx(budget, rel=0.05)  # masks are of whole cells
    assert [str(recipe.training) for recipe in FIVE] == ["gradual"] * 4 + ["one_shot"]


@pytest.mark.slow
def test_a_judgement_goes_on_where_it_was_stopped(
    judged: tuple[TaskComparison, Judgement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wanted = judged
    comparison = comparison_in(tmp_path / "run")
    trained: list[str] = []

    def stopped_in_the_second(model: object, plan: Plan, *args: object, **kwargs: object) -> None:
        trained.append(plan.key)
        if len(trained) == 2:
            raise KeyboardInterrupt
        finetune_(model, plan, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(application, "finetune_", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        held(comparison)
    comparison.run.lock.close()
    again = held(comparison_in(tmp_path / "run"))
    assert figures(again) == figures(wanted)
    assert len(trained) == len(again.trained) + 1, "the one that was stopped, twice"


def figures(judgement: Judgement) -> list[object]:
    """All that the clock has no part in."""
    return [
        *sorted((row.plan, row.validation, row.test, row.steps) for row in judgement.trained),
        *sorted((each.plan, each.recovery, each.score) for each in judgement.scores),
    ]


@pytest.mark.slow
def test_a_plan_whose_training_diverges_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = comparison_in(tmp_path / "run")

    def diverging(*args: object, **kwargs: object) -> None:
        raise NumericalError("the loss is nan")

    monkeypatch.setattr(application, "finetune_", diverging)
    found = comparison.hold(jobs_of([Choice("knapsack"), Choice(FIVE_RECIPES)], 1, (0,)), finetune=True, evaluations=0)
    assert {row.failed for row in found.trained} == {"the loss is nan"}
    assert [each.agent for each in found.outcomes] == ["knapsack"], "no recipe came to a model"
    assert found.final == []
    assert "the loss is nan" in report(found)
    assert all(each.correlation is None for each in found.correlations())


@pytest.mark.slow
def test_without_fine_tuning_nothing_is_judged(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path / "run")
    jobs = jobs_of([Choice("knapsack"), Choice("random")], 1, (1,))
    found = comparison.hold(jobs, finetune=False, evaluations=1)
    assert (found.trained, found.scores) == ([], [])
    assert "fine-tuning" not in report(found)


@pytest.mark.slow
def test_report_and_json_show_the_judgement(judged: tuple[TaskComparison, Judgement]) -> None:
    _, found = judged
    text = report(found)
    for name in (*RECOVERIES, WHOLE, FIVE_RECIPES):
        assert f"| {name} " in text
    data = json.loads(json.dumps(found.to_json()))
    assert [each["score"] for each in data["correlations"]] == [each.score for each in found.correlations()]
    assert data["trained"][0]["test"] == found.trained[0].test


# The statistics ------------------------------------------------------------------------------------------------------


def test_the_rank_correlation_is_spearmans_averaged_over_tasks() -> None:
    draws = np.random.default_rng(3)
    x = draws.normal(size=20)
    good = np.array([x, x + draws.normal(size=20) * 0.5])
    tied = np.round(good, 0)
    mean, low, high = rank_correlation([good])
    assert mean == pytest.approx(spearmanr(*good).statistic)
    assert mean is not None
    assert low is not None
    assert high is not None
    assert -1.0 <= low < mean < high <= 1.0
    both, _, _ = rank_correlation([good, tied])
    assert both == pytest.approx((spearmanr(*good).statistic + spearmanr(*tied).statistic) / 2)
    again, lower, higher = rank_correlation([np.tile(good, 4)])  # as many plans again, and again
    assert again == pytest.approx(mean)
    assert lower is not None
    assert higher is not None
    assert higher - lower < high - low


def test_what_has_no_ranks_has_no_correlation() -> None:
    constant = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    assert rank_correlation([constant]) == (None, None, None)
    assert rank_correlation([]) == (None, None, None)
    rising = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    assert rank_correlation([constant, rising]) == pytest.approx((1.0, 1.0, 1.0))


def plan(sparsity: float) -> Plan:
    return Plan({"a": LayerPlan(sparsity, Choice("group", {"size": 4}), Choice("magnitude"))})


def outcome(agent: str, sparsity: float, evaluations: int = 10, steps: int = 0) -> Outcome:
    figures = (0.0, 0.5, 2.0, 0.0)
    return Outcome("t", agent, 0, evaluations, *figures, 5.0, 10, steps, plan(sparsity).to_json())


def judgement() -> Judgement:
    tests = [0.9, 0.92, 0.91, 0.95, 0.93]
    plans = [plan(0.1 * at) for at in range(1, 6)]
    trained = [
        Trained("t", each.key, 7.0, 100, test - 0.01, test, 2.0) for each, test in zip(plans, tests, strict=True)
    ]
    scores = [
        CheapScore("t", each.key, name, seconds, steps, score)
        for each, test in zip(plans, tests, strict=True)
        for name, seconds, steps, score in (("none", 0.1, 0, -test), ("train", 2.0, 20, test**2))
    ]
    outcomes = [
        outcome("knapsack", 0.1, 0),
        outcome("tpe", 0.2, steps=200),
        outcome("tpe", 0.3, evaluations=1, steps=20),
        outcome(FIVE_RECIPES, 0.4, 0, steps=500),
    ]
    return Judgement(outcomes, 10, trained, scores)


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_agents_are_ranked_by_the_test_score_and_all_that_was_spent_is_counted() -> None:
    found = cells(trained_table(judgement()))
    assert found["knapsack"] == ["+0.00 [+0.00, +0.00]", "90.00", "2.00x", "10", "12.0", "100"]
    assert found["tpe"] == ["+2.00 [+2.00, +2.00]", "92.00", "2.00x", "10", "12.0", "300"], "search and training"
    assert found[FIVE_RECIPES] == ["+5.00 [+5.00, +5.00]", "95.00", "2.00x", "10", "5.0", "500"], "trained already"


def test_scores_are_listed_the_best_first_with_their_cost() -> None:
    found = judgement().correlations()
    assert [(each.score, each.plans, each.seconds, each.steps) for each in found] == [
        ("train", 5, 2.0, 20.0),
        ("none", 5, 0.1, 0.0),
        (WHOLE, 5, 7.0, 100.0),
    ]
    assert [each.correlation for each in found] == pytest.approx([1.0, -1.0, 1.0])
    assert list(cells(correlation_table(judgement()))) == ["train", "none", WHOLE]
    few = judgement()
    few = replace(few, trained=few.trained[: FEWEST - 1])
    assert {each.correlation for each in few.correlations()} == {None}


def test_an_outcome_whose_plan_was_not_kept_is_not_judged() -> None:
    whole = judgement()
    old = replace(whole, outcomes=[replace(each, plan=None) for each in whole.outcomes])
    assert old.final == []


@pytest.mark.parametrize(
    ("chosen", "more"),
    [
        (Choice("reconstruct"), []),
        (Choice("reconstruct", {"damping": 0.01}), []),
        (Choice("train", {"steps": 100}), []),
        (Choice("train", {"steps": 50}), ["train(steps=50)"]),
    ],
)
def test_every_recovery_is_tried_once_and_the_configs_own(chosen: Choice, more: list[str]) -> None:
    assert [str(each) for each in recoveries_of(chosen, Plan({}))] == [*RECOVERIES, "train(steps=100)", *more]


def test_entrants_that_are_no_agents_are_compared_at_a_speedup_too(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path / "run", target={"sparsity": 0.5})
    for agent in ("uniform", FIVE_RECIPES):
        with pytest.raises(ConfigError, match=r"the target has sparsity alone: set target\.speedup"):
            comparison.hold(jobs_of([Choice(agent)], 1, (1,)), finetune=False, evaluations=1)


@pytest.mark.slow
def test_a_run_that_trains_nothing_counts_no_steps(tmp_path: Path) -> None:
    untrained = {"finetune": {"post_training": True}, "env": {**SMALL["env"], "recovery": "post_training"}}
    comparison = comparison_in(tmp_path / "run", **untrained)
    found = comparison.hold(jobs_of([Choice("knapsack")], 1, (1,)), finetune=True, evaluations=1)
    assert [(row.steps, row.failed) for row in found.trained] == [(0, None)]


def test_another_target_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[task]\nname = "digits"\n\n[target]\nsparsity = 0.5\n')
    with pytest.raises(ConfigError, match=r"set target\.speedup"):
        compare_run(config, tmp_path / "run", [], ["uniform"], ["1"], 1)
    assert not (tmp_path / "run").exists()


def test_a_recovery_that_cannot_do_with_a_plans_criterion_is_not_tried() -> None:
    plan = Plan({"0": LayerPlan(0.5, Choice("unstructured"), Choice("gradient"))})
    names = [each.name for each in recoveries_of(Choice("reconstruct"), plan)]
    assert names == [*(name for name in RECOVERIES if name != "post_training"), "train"]
