"""What a comparison of agents finds: the best plan of each after some evaluations as measured, and the statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoprune.documents import parsed
from autoprune.errors import FileError
from autoprune.files import append_line, read_lines
from autoprune.report.table import markdown_table

UNASKED = 0  # evaluations of a rule that makes its plan without any
FIVE_RECIPES = "five_recipes"  # no agent of the registry: see `recipes.py`
ONE_SEED = ("uniform", "greedy", "knapsack", FIVE_RECIPES)  # these draw nothing
RESAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True)
class Outcome:
    """The best plan an agent had after some evaluations, as measured.

    Attributes:
        task: the problem's name.
        agent: the registry row, with its arguments where they are not the default ones.
        evaluations: how many it was given; 0 for a plan made without any.
        reward: of the search, by scores and the latency table.
        score: of the plan moved to the target's measured speed-up.
        speedup: measured.
        measured_reward: of that score and speed-up.
        seconds: the search took up to there, evaluations that were remembered not counted.
        trials: it really made, of those that it was given; None where that was not noted.
        steps: of the optimizer, that its trials trained for; likewise.
        plan: as it was measured, on the target, as JSON; None where it was not kept.
    """

    task: str
    agent: str
    seed: int
    evaluations: int
    reward: float
    score: float
    speedup: float
    measured_reward: float
    seconds: float
    trials: int | None = None
    steps: int | None = None
    plan: Mapping[str, Any] | None = None


Row = TypeVar("Row")


class RowLog(Generic[Row]):
    """Rows of a comparison as JSON lines, so that it goes on where it was stopped.

    Attributes:
        kind: the rows' dataclass.
        what: they are, in the plural.
    """

    kind: type[Row]
    what: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """All rows, in the order in which they were appended.

        Raises:
            FileError: the file is corrupt.
        """
        lines = read_lines(self.path, self.what)
        try:
            return parsed(list[self.kind], lines)  # type: ignore[name-defined]  # a class, known by now
        except FileError as error:
            raise FileError(f"{self.what} are corrupt: {self.path} ({error}). Delete the file.") from None

    def append(self, rows: Sequence[Row]) -> None:
        for row in rows:
            append_line(self.path, asdict(row))  # type: ignore[call-overload]  # a dataclass


class OutcomeLog(RowLog[Outcome]):
    """The outcomes."""

    kind, what = Outcome, "the outcomes"


def of_last_checkpoint(outcomes: Sequence[Outcome], evaluations: int) -> list[Outcome]:
    """Those after so many evaluations, and of each rule the one that it has."""
    return [
        each
        for each in outcomes
        if each.evaluations == evaluations or (each.evaluations == UNASKED and each.agent in ONE_SEED)
    ]


# What outcomes add up to ---------------------------------------------------------------------------------------------


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half, the ends weighed by what of them is in it (Agarwal et al. 2021, rliable)."""
    return float(_interquartile_means(np.asarray(values, np.float64)))


def _interquartile_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those over the last axis."""
    ordered, count = np.sort(values), values.shape[-1]
    edges = np.clip(np.arange(count + 1) / count, 0.25, 0.75)
    weights = np.diff(edges)
    means: NDArray[np.float64] = (ordered * weights).sum(axis=-1) / weights.sum()
    return means


def interval(by_task: Mapping[str, Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the interquartile mean over all values, resampled within each task (stratified)."""
    values = np.concatenate([np.asarray(of_task, np.float64) for of_task in by_task.values()])
    sizes = np.array([len(of_task) for of_task in by_task.values()])
    # of each value in a resample: how many its task has, and where they begin
    counts, starts = np.repeat(sizes, sizes), np.repeat(np.cumsum(sizes) - sizes, sizes)
    picked = np.random.default_rng(seed).integers(0, np.broadcast_to(counts, (RESAMPLES, len(values))))
    low, high = np.quantile(_interquartile_means(values[starts + picked]), (0.025, 0.975))
    return float(low), float(high)


def points_above(outcomes: Sequence[Outcome], agent: str, evaluations: int) -> dict[str, list[float]]:
    """Task -> points of an agent's measured scores above the knapsack's on it, a seed each."""
    base = {each.task: each.score for each in outcomes if each.agent == "knapsack"}
    above: dict[str, list[float]] = {}
    for each in outcomes:
        if (each.agent, each.evaluations) == (agent, evaluations) and each.task in base:
            above.setdefault(each.task, []).append(100 * (each.score - base[each.task]))
    return above


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Agent by evaluations: measured score above the knapsack's, interquartile mean and interval, in points."""
    budgets = sorted({each.evaluations for each in outcomes})
    rows = []
    for agent in dict.fromkeys(each.agent for each in outcomes):
        cells = []
        for budget in budgets:
            by_task = points_above(outcomes, agent, budget)
            if not by_task:
                cells.append("-")
                continue
            everything = [value for values in by_task.values() for value in values]
            low, high = interval(by_task)
            cells.append(f"{interquartile_mean(everything):+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append([agent, *cells])
    return markdown_table(("agent", *(f"{budget} evaluations" for budget in budgets)), rows, left=1)


def task_table(outcomes: Sequence[Outcome], evaluations: int) -> str:
    """Task by agent: measured score in points, mean over seeds, at so many evaluations or a rule's none."""
    agents, last = list(dict.fromkeys(each.agent for each in outcomes)), of_last_checkpoint(outcomes, evaluations)
    rows = []
    for task in dict.fromkeys(each.task for each in outcomes):
        cells = []
        for agent in agents:
            fitting = [each for each in last if (each.task, each.agent) == (task, agent)]
            cells.append(f"{100 * float(np.mean([each.score for each in fitting])):.2f}" if fitting else "-")
        rows.append([task, *cells])
    return markdown_table(("task", *agents), rows, left=1)


def cost_table(outcomes: Sequence[Outcome]) -> str:
    """What each agent spent up to its last checkpoint: trials, seconds and training steps, on average."""
    rows = []
    for agent in dict.fromkeys(each.agent for each in outcomes):
        mine = [each for each in outcomes if each.agent == agent and each.trials is not None]
        last = [each for each in mine if each.evaluations == max(other.evaluations for other in mine)]
        if last:
            trials, seconds, steps = (
                float(np.mean([getattr(each, name) for each in last])) for name in ("trials", "seconds", "steps")
            )
            rows.append([agent, f"{trials:.0f}", f"{seconds:.1f}", f"{steps:.0f}"])
    return markdown_table(("agent", "trials", "seconds", "training steps"), rows, left=1) if rows else ""
