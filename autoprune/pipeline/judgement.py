"""What a comparison comes to after training: the agents' tables, and how well cheap scores foretell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from autoprune.pipeline.outcomes import (
    FIVE_RECIPES,
    RESAMPLES,
    Outcome,
    interquartile_mean,
    interval,
    of_last_checkpoint,
)
from autoprune.pipeline.yardstick import CheapScore, Trained
from autoprune.plan import Plan
from autoprune.report.table import MISSING, markdown_table

FEWEST = 4  # plans of a task: of less, ranks say nothing
WHOLE = "whole training, validation"  # the most that any score can be expected to foretell


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of a score with the test score after training.

    Attributes:
        score: the recovery after which it is taken.
        correlation: within each task, averaged over tasks; None where it is undefined.
        low: of the 95% bootstrap interval over plans, resampled within each task.
        high: likewise.
        plans: of all tasks.
        seconds: of one score, median.
        steps: of the optimizer, that one score trains for, on average.
    """

    score: str
    correlation: float | None
    low: float | None
    high: float | None
    plans: int
    seconds: float
    steps: float


@dataclass(frozen=True)
class Judgement:
    """What was trained and scored, of one task or several.

    Attributes:
        outcomes: of the comparison.
        evaluations: of the checkpoint whose plans were trained.
        trained: the plans' trainings.
        scores: the plans' cheap scores.
    """

    outcomes: Sequence[Outcome]
    evaluations: int
    trained: Sequence[Trained]
    scores: Sequence[CheapScore]

    @property
    def final(self) -> list[tuple[Outcome, Trained]]:
        """The last checkpoint's outcomes whose plan has a test score, and that."""
        found, rows = [], {(each.task, each.plan): each for each in self.trained}
        for outcome in of_last_checkpoint(self.outcomes, self.evaluations):
            key = plan_key(outcome)
            row = None if key is None else rows.get((outcome.task, key))
            if row is not None and row.test is not None:
                found.append((outcome, row))
        return found

    def correlations(self) -> list[RankCorrelation]:
        """Of each recovery, the best first; then of the validation score after the whole training."""
        tested = [(row.task, row.plan, row.test) for row in self.trained if row.test is not None]
        found = []
        for recovery in dict.fromkeys(each.recovery for each in self.scores):
            rows = [each for each in self.scores if each.recovery == recovery]
            known = {(each.task, each.plan): each.score for each in rows}
            found.append(_correlation(recovery, _pairs(tested, known), rows))
        found.sort(key=lambda each: -np.inf if each.correlation is None else each.correlation, reverse=True)
        after = {(row.task, row.plan): row.validation for row in self.trained}
        return [*found, _correlation(WHOLE, _pairs(tested, after), self.trained)]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "evaluations": self.evaluations,
            "outcomes": [asdict(each) for each in self.outcomes],
            "trained": [asdict(each) for each in self.trained],
            "scores": [asdict(each) for each in self.scores],
            "correlations": [asdict(each) for each in self.correlations()],
        }


def plan_key(outcome: Outcome) -> str | None:
    """The key of an outcome's plan; None where the plan was not kept."""
    return None if outcome.plan is None else Plan.from_json(outcome.plan).key


def _pairs(
    tested: Sequence[tuple[str, str, float]], known: Mapping[tuple[str, str], float | None]
) -> list[NDArray[np.float64]]:
    """Score and test score, (2, plans), of each task that has enough plans with both."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    for task, plan, test in tested:
        score = known.get((task, plan))
        if score is not None:
            by_task.setdefault(task, []).append((score, test))
    return [np.array(pairs, np.float64).T for pairs in by_task.values() if len(pairs) >= FEWEST]


def _correlation(
    score: str, tasks: Sequence[NDArray[np.float64]], rows: Sequence[CheapScore] | Sequence[Trained]
) -> RankCorrelation:
    correlation, low, high = rank_correlation(tasks)
    seconds, steps = float(np.median([row.seconds for row in rows])), float(np.mean([row.steps for row in rows]))
    return RankCorrelation(score, correlation, low, high, sum(pairs.shape[1] for pairs in tasks), seconds, steps)


def rank_correlation(
    tasks: Sequence[NDArray[np.float64]], seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """Spearman's correlation within each task, averaged over tasks, and its 95% bootstrap interval.

    Args:
        tasks: of each the two figures of its plans, ``(2, plans)``. A task where one of them is the same for all plans
            has no ranks, and is left out, and so is a resample of it where that is so.
        seed: of the resamples.

    Returns:
        The mean, and the interval's ends; None where no task has ranks.
    """
    draws = np.random.default_rng(seed)
    ranked = [pairs for pairs in tasks if all(len(np.unique(row)) > 1 for row in pairs)]
    if not ranked:
        return None, None, None
    mean = float(np.mean([_spearman(pairs) for pairs in ranked]))
    resampled = np.array(
        [_spearman(pairs[:, draws.integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))]) for pairs in ranked]
    )
    defined = resampled[:, np.isfinite(resampled).any(axis=0)]
    low, high = np.quantile(np.nanmean(defined, axis=0), (0.025, 0.975))
    return mean, float(low), float(high)


def _spearman(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis of ``(2, ..., plans)``; not a number where either row is constant."""
    ranks = rankdata(pairs, axis=-1)
    x, y = ranks - ranks.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return found


# Tables --------------------------------------------------------------------------------------------------------------


def trained_table(judgement: Judgement) -> str:
    """Agent by what its plans score after training, at which measured speed-up, and all that this took."""
    final = judgement.final
    base = {outcome.task: row.test for outcome, row in final if outcome.agent == "knapsack"}
    rows = []
    for agent in dict.fromkeys(outcome.agent for outcome, _ in final):
        mine = [(outcome, row) for outcome, row in final if outcome.agent == agent]
        above: dict[str, list[float]] = {}
        for outcome, row in mine:
            beside = base.get(outcome.task)
            if beside is not None and row.test is not None:
                above.setdefault(outcome.task, []).append(100 * (row.test - beside))
        rows.append([agent, _interval(above), *_figures(mine)])
    header = ("agent", "points above the knapsack", "test", "speed-up", "trials", "seconds", "training steps")
    return markdown_table(header, rows, left=1)


def _interval(above: Mapping[str, Sequence[float]]) -> str:
    if not above:
        return MISSING
    low, high = interval(above)
    middle = interquartile_mean([value for values in above.values() for value in values])
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def _figures(mine: Sequence[tuple[Outcome, Trained]]) -> list[str]:
    """Means over tasks and seeds: score in points, speed-up, and what search and training took together."""
    test = float(np.mean([row.test for _, row in mine]))
    speedup = float(np.mean([row.speedup for _, row in mine]))
    known = [(outcome, row) for outcome, row in mine if outcome.trials is not None]
    if not known:
        return [f"{100 * test:.2f}", f"{speedup:.2f}x", MISSING, MISSING, MISSING]
    last = [0.0 if outcome.agent == FIVE_RECIPES else 1.0 for outcome, _ in known]  # its trials are trainings already
    trials = np.mean([outcome.trials or 0 for outcome, _ in known])
    seconds = np.mean([outcome.seconds + at * row.seconds for at, (outcome, row) in zip(last, known, strict=True)])
    steps = np.mean([(outcome.steps or 0) + at * row.steps for at, (outcome, row) in zip(last, known, strict=True)])
    return [f"{100 * test:.2f}", f"{speedup:.2f}x", f"{trials:.0f}", f"{seconds:.1f}", f"{steps:.0f}"]


def correlation_table(judgement: Judgement) -> str:
    """Score by how well it foretells the test score after training, and what it costs."""
    rows = []
    for each in judgement.correlations():
        cell = MISSING
        if each.correlation is not None:
            cell = f"{each.correlation:+.2f} [{each.low:+.2f}, {each.high:+.2f}]"
        rows.append([each.score, cell, f"{each.plans}", f"{each.seconds:.3g}", f"{each.steps:.0f}"])
    return markdown_table(("score after", "rank correlation", "plans", "seconds", "training steps"), rows, left=1)


def judgement_text(judgement: Judgement) -> str:
    """The tables, with what their figures are; says so where nothing was trained."""
    failed = [row for row in judgement.trained if row.failed is not None]
    text = (
        "Test score after the same fine-tuning, at the same measured speed-up; points above the knapsack's are the "
        "interquartile mean over tasks and seeds, with its 95% bootstrap interval. Trials, seconds and training steps "
        f"are those of the search and of the training that follows it, on average.\n\n{trained_table(judgement)}\n\n"
        "How well a score that costs less foretells that one: Spearman's rank correlation over plans, within a task, "
        "with its 95% bootstrap interval; seconds of one score, median. The last row is the validation score of the "
        f"trained model, which none can be expected to surpass.\n\n{correlation_table(judgement)}"
    )
    return text + "".join(f"\n{row.task}: a plan's training failed: {row.failed}\n" for row in failed)
