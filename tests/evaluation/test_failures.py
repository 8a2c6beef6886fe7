"""Evaluations that diverge, or in which a user's function fails, are failures with a reason."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.evaluation.measurement import ByTable, CachedEvaluate, Evaluated, Failure
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
        (raising(AttributeError("no attribute fc")), "the model cannot be evaluated: AttributeError: no attribute fc."),
        (raising(StopIteration()), "the model cannot be evaluated: StopIteration."),
        (
            raising(AutopruneError("it cannot.")),
            "the model cannot be evaluated: it cannot.",
        ),
    ],
)
def test_a_score_that_is_none_fails_its_trial(
    evaluator: Evaluator, plans: list[Plan], score: Any, reason: str, timed: bool
) -> None:
    evaluate = replace(scoring(evaluator, score), timed=timed)
    assert reason in failed(evaluate(plans[0]))
    assert reason in failed(ByTable(evaluate, evaluator.table)(plans[0]))
    assert reason in failed(PairedEvaluator(evaluate, plans[1], 2.0)(plans[0]))


def test_recoveries_that_diverge_fail_their_trial(evaluator: Evaluator, plans: list[Plan]) -> None:
    name = next(iter(evaluator.subject.dense.state_dict()))
    assert name in failed(replace(evaluator, recovery=Diverging(name))(plans[0]))
    assert "singular" in failed(replace(evaluator, recovery=Singular())(plans[0]))
    settings = replace(evaluator.subject.settings, learning_rate=1e30, warmup=0)
    wild = replace(evaluator, subject=replace(evaluator.subject, settings=settings))
    assert "evaluate returned nan" in failed(wild(plans[0]))  # the weights are finite, and what they give is not


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_what_is_no_fault_of_the_function_passes(evaluator: Evaluator, plans: list[Plan], error: Any) -> None:
    with pytest.raises(type(error)):
        scoring(evaluator, raising(error))(plans[0])


def test_a_loss_that_fails_while_it_is_trained_with_fails_its_trial(evaluator: Evaluator, plans: list[Plan]) -> None:
    def loss(output: Tensor, target: Tensor) -> Any:
        return None

    task = replace(evaluator.subject.task, loss=loss)
    failing = replace(evaluator, subject=replace(evaluator.subject, task=task))
    assert "the loss must be one number" in failed(failing(plans[0]))


def test_a_failure_knows_what_was_raised_in_this_process_alone(evaluator: Evaluator, plans: list[Plan]) -> None:
    error = KeyError("z")
    remembered = CachedEvaluate(scoring(evaluator, raising(error)))
    found = remembered(plans[0])
    assert remembered.error is error
    assert isinstance(found, Failure)
    assert found.error is None
    assert pickle.loads(pickle.dumps(Failure("so", error))) == Failure("so")  # noqa: S301 - our own


def test_a_score_may_leave_the_model_in_any_mode(evaluator: Evaluator, plans: list[Plan]) -> None:
    def score(model: nn.Module, split: Batches) -> float:
        assert not model.training
        model.train()
        return -1.0

    task = replace(evaluator.subject.task, score=score)
    assert task.evaluate(evaluator.subject.dense) == -1.0
    assert not any(module.training for module in evaluator.subject.dense.modules())
