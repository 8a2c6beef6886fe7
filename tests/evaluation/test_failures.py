"""Evaluations that diverge are failures with a reason; what is no matter of numbers is an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.evaluation.evaluator import Beside, Evaluator
from autoprune.evaluation.measurement import ByTable, Evaluated, Failure
from autoprune.evaluation.recovery import Recovery, Subject
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.masks import Batches
from autoprune.plan import Plan


def scoring(evaluator: Evaluator, score: Callable[[nn.Module, Batches], Any]) -> Evaluator:
    task = replace(evaluator.subject.task, score=score)
    return replace(evaluator, subject=replace(evaluator.subject, task=task), recovery=NoRecovery())


def raising(error: Exception) -> Callable[[nn.Module, Batches], Any]:
    def score(model: nn.Module, split: Batches) -> float:
        raise error

    return score


class Diverging(Recovery):
    """Ends with weights, or statistics, that are no numbers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        model.state_dict()[self.name].flatten()[3] = math.nan


class Singular(Recovery):
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        torch.linalg.inv(torch.zeros(3, 3))


def failed(outcome: Evaluated) -> str:
    assert isinstance(outcome, Failure)
    return outcome.reason


@pytest.mark.parametrize("timed", [True, False], ids=["measured", "table"])
@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (lambda model, split: math.nan, "evaluate returned nan"),
        (lambda model, split: None, "it returned None"),
        (lambda model, split: torch.zeros(2), "shape (2,)"),
        (raising(ZeroDivisionError("division by zero")), "ZeroDivisionError: division by zero"),
        (raising(ValueError("Input contains NaN.")), "ValueError: Input contains NaN."),
    ],
)
def test_a_score_that_is_none_fails_its_trial(
    evaluator: Evaluator, plans: list[Plan], score: Any, reason: str, timed: bool
) -> None:
    evaluate = replace(scoring(evaluator, score), timed=timed)
    assert reason in failed(evaluate(plans[0]))
    assert reason in failed(ByTable(evaluate, evaluator.table)(plans[0]))
    assert reason in failed(Beside(evaluate, plans[1], 2.0)(plans[0]))


def test_recoveries_that_diverge_fail_their_trial(evaluator: Evaluator, plans: list[Plan]) -> None:
    name = next(iter(evaluator.subject.dense.state_dict()))
    assert name in failed(replace(evaluator, recovery=Diverging(name))(plans[0]))
    assert "singular" in failed(replace(evaluator, recovery=Singular())(plans[0]))
    settings = replace(evaluator.subject.settings, learning_rate=1e30, warmup=0)
    wild = replace(evaluator, subject=replace(evaluator.subject, settings=settings))
    assert "evaluate returned nan" in failed(wild(plans[0]))  # the weights are finite, and what they give is not


def test_other_errors_are_errors(evaluator: Evaluator, plans: list[Plan]) -> None:
    with pytest.raises(AttributeError, match="fc"):
        scoring(evaluator, raising(AttributeError("no attribute fc")))(plans[0])


def test_a_score_may_leave_the_model_in_any_mode(evaluator: Evaluator, plans: list[Plan]) -> None:
    def score(model: nn.Module, split: Batches) -> float:
        assert not model.training
        model.train()
        return -1.0

    task = replace(evaluator.subject.task, score=score)
    assert task.evaluate(evaluator.subject.dense) == -1.0
    assert not any(module.training for module in evaluator.subject.dense.modules())
