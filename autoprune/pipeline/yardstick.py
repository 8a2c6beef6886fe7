"""The yardstick of a comparison: what a plan scores after its training, at the target's measured speed-up.

Every plan is fine-tuned once, with the same settings and the same seed, and its repacked model is tested and timed.
Beside that the plan is scored under every recovery, as a search would score it: how well such a cheap score foretells
the other one says what a search may go by.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from autoprune.agents.baseline import CLOSE
from autoprune.envs import Problem
from autoprune.envs.projection import meet, release_useless
from autoprune.errors import ConfigError, NumericalError
from autoprune.evaluation.evaluator import PairedEvaluator
from autoprune.evaluation.measurement import Evaluate, Failure, Measurement
from autoprune.evaluation.recovery import RECOVERIES
from autoprune.pipeline.application import AppliedPlan
from autoprune.pipeline.outcomes import RowLog
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.training.loop import count_batches

LONGER = Choice("train", {"steps": 100})  # beside every recovery with its default arguments
_CORRECTIONS = 8  # of the predicted speed-up, for one measured plan


class OnTarget(NamedTuple):
    """A plan that was moved to a measured speed-up, and its measurement there."""

    plan: Plan
    measurement: Measurement


def at_speedup(problem: Problem, plan: Plan, measure: Evaluate) -> OnTarget | None:
    """Shifts all sparsities by one amount until the *measured* speed-up is at most `CLOSE` below the target's.

    The shift is found by bisection on the speed-up that the latency table predicts.

    Returns:
        The best-scoring plan that is fast enough, else the fastest; None when all evaluations failed.
    """
    target = problem.required_speedup
    assert target is not None
    table, predicted = problem.table, problem.table.predict_speedup(plan)
    low, high = 1.0, table.predict_speedup(problem.uniform(problem.max_sparsity))  # bounds of `predicted`
    found: list[OnTarget] = []
    candidate = plan
    for _ in range(_CORRECTIONS):
        measured = measure(candidate)
        if isinstance(measured, Failure):
            break
        found.append(OnTarget(candidate, measured))
        if abs(measured.speedup / target - 1.0) <= CLOSE:
            break
        low, high = (low, min(high, predicted)) if measured.speedup > target else (max(low, predicted), high)
        guess = predicted * target / measured.speedup
        predicted = guess if low < guess < high else math.sqrt(low * high)
        candidate = release_useless(meet(plan, table, max(1.001, predicted), problem.max_sparsity), table)
    fast = [each for each in found if each.measurement.speedup >= target * (1.0 - CLOSE)]
    if fast:
        return max(fast, key=lambda each: each.measurement.score)
    return max(found, key=lambda each: each.measurement.speedup, default=None)


@dataclass(frozen=True)
class Trained:
    """What fine-tuning made of a plan.

    Attributes:
        task: the problem's name.
        plan: its key.
        seconds: of the training, in the process that ended it.
        steps: of the optimizer.
        validation: score of the repacked model on the validation split; None where the training diverged.
        test: likewise on the test split.
        speedup: likewise, measured in turns with the knapsack's plan, as the plan's own before the training.
        failed: why there is no score.
    """

    task: str
    plan: str
    seconds: float
    steps: int
    validation: float | None = None
    test: float | None = None
    speedup: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class CheapScore:
    """A plan's score on the validation split after a recovery, nothing being timed.

    Attributes:
        task: the problem's name.
        plan: its key.
        recovery: with its arguments.
        seconds: of recovery and scoring together.
        steps: of the optimizer, that the recovery trains for.
        score: None where the recovery failed.
    """

    task: str
    plan: str
    recovery: str
    seconds: float
    steps: int
    score: float | None = None


class TrainedLog(RowLog[Trained]):
    """What was fine-tuned."""

    kind, what = Trained, "the trained plans"


class CheapScoreLog(RowLog[CheapScore]):
    """What was scored."""

    kind, what = CheapScore, "the scores of plans"


def recoveries_of(chosen: Choice, plan: Plan) -> list[Choice]:
    """Every recovery of the registry, a longer training, and the one that a config chose; each once.

    Those that cannot do with the plan's criteria are left out.
    """
    every = [each for each in (*(Choice(name) for name in RECOVERIES), LONGER, chosen) if _fits(each, plan)]
    settings = [(type(made := RECOVERIES.create(each)), vars(made)) for each in every]
    return [each for at, each in enumerate(every) if settings[at] not in settings[:at]]


def _fits(recovery: Choice, plan: Plan) -> bool:
    try:
        RECOVERIES.create(recovery).check_criteria({layer.criterion.name for layer in plan.layers.values()})
    except ConfigError:
        return False
    return True


class Yardstick:
    """Trains and scores the plans of one task; whatever was done before is read.

    Args:
        name: of the task.
        run: whose training, evaluation and dense model they are.
        reference: the plan that trained models are timed in turns with.
        speedup: the reference's.
        folder: where the figures are kept, and plans in training.
    """

    def __init__(self, name: str, run: Run, reference: Plan, speedup: float, folder: Path) -> None:
        self.name, self._run, self._folder = name, run, folder
        self._reference, self._speedup = reference, speedup
        self.trained_log = TrainedLog(folder / "trained.jsonl")
        self.score_log = CheapScoreLog(folder / "scores.jsonl")
        self._trained = {each.plan: each for each in self.trained_log.read()}
        self._scores = {(each.plan, each.recovery): each for each in self.score_log.read()}

    def judge(self, plans: Sequence[Plan]) -> None:
        """Trains each distinct plan and scores it under every recovery; the logs hold what came of it."""
        distinct = {plan.key: plan for plan in plans}
        with self._run.progress.bar(f"judge {self.name}", len(distinct)) as bar:
            for plan in distinct.values():
                for recovery in recoveries_of(self._run.config.env.recovery, plan):
                    self.score(plan, recovery)
                trained = self.train(plan)
                bar.advance(1, trained.failed or f"{self._run.task.metric.text(trained.test or 0.0)} after training")

    def train(self, plan: Plan) -> Trained:
        """Fine-tunes the dense model to a plan, tests the repacked model and times it; goes on where it was stopped."""
        if plan.key not in self._trained:
            folder = self._folder / "training" / plan.key
            self._trained[plan.key] = row = self._train(plan, folder)
            self.trained_log.append([row])
            shutil.rmtree(folder, ignore_errors=True)
        return self._trained[plan.key]

    def _train(self, plan: Plan, folder: Path) -> Trained:
        run, preparation = self._run, self._run.preparation
        started = run.context.clock()
        row = Trained(self.name, plan.key, 0.0, self._steps(plan))
        try:
            model = AppliedPlan(replace(run.context, directory=folder), preparation, plan).fine_tuned.model
            row = replace(row, seconds=run.context.clock() - started)
            fast = self._paired.evaluator.repacked(model, plan)
            validation, test = run.task.evaluate(fast), run.task.test(fast)
        except NumericalError as error:
            return replace(row, failed=str(error))
        return replace(row, validation=validation, test=test, speedup=self._paired.speedup_of(fast))

    def _steps(self, plan: Plan) -> int:
        """Of the optimizer, that fine-tuning takes; none where a run trains nothing."""
        if self._run.config.finetune.post_training or all(layer.whole for layer in plan.layers.values()):
            return 0
        settings = self._run.preparation.subject.settings.changed(plan.settings)
        whole = settings.epochs * count_batches(self._run.task.train)
        return min(whole, settings.max_steps or whole)

    def score(self, plan: Plan, recovery: Choice) -> CheapScore:
        """Scores a plan as a search with this recovery would."""
        key = (plan.key, str(recovery))
        if key not in self._scores:
            made, clock = RECOVERIES.create(recovery), self._run.context.clock
            evaluate = replace(self._run.preparation.evaluator, recovery=made, timed=False)
            started = clock()
            found = evaluate(plan)
            row = CheapScore(self.name, *key, clock() - started, made.steps)
            self._scores[key] = row if isinstance(found, Failure) else replace(row, score=found.score)
            self.score_log.append([self._scores[key]])
        return self._scores[key]

    @cached_property
    def _paired(self) -> PairedEvaluator:
        protocol = self._run.context.final_protocol
        evaluator = replace(self._run.preparation.evaluator, protocol=protocol, timed=True)
        return PairedEvaluator(evaluator, self._reference, self._speedup)
