"""What a user sees of a search while it runs: the progress bar and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoprune.evaluation.measurement import FAILED
from autoprune.metric import Metric
from autoprune.progress import Bar
from autoprune.report.data import MeasuredPoint
from autoprune.report.plots import front_figure
from autoprune.report.tensorboard import TrialWriter

FRONT_EVERY = 25  # trials between two pictures of the front


def point(trial: Mapping[str, Any]) -> MeasuredPoint:
    """A trial in the plane of score and latency."""
    return MeasuredPoint(float(trial["latency_ms"]), float(trial["score"]))


class SearchMonitor:
    """Shows trials as they come; `resumed` comes first, once, with those of an interrupted search.

    Trials that failed have a reward, and no place in the picture.
    """

    def __init__(self, directory: Path, config: str, metric: Metric, dense: MeasuredPoint, bar: Bar) -> None:
        self._directory, self._config, self._metric, self._dense, self._bar = directory, config, metric, dense, bar
        self._trials: list[Mapping[str, Any]] = []
        self._writer = TrialWriter(directory, config, metric=metric)

    def resumed(self, trials: Sequence[Mapping[str, Any]]) -> None:
        self._writer = TrialWriter(self._directory, self._config, trials, self._metric)
        self._trials = [trial for trial in trials if FAILED not in trial]
        self._advance(len(trials))

    def trial(self, index: int, trial: Mapping[str, Any]) -> None:
        if FAILED not in trial:
            self._trials.append(trial)
        self._writer.trial(index, trial)
        if index % FRONT_EVERY == FRONT_EVERY - 1 and self._trials:
            figure = front_figure(
                [point(each) for each in self._trials], point(self._best), self._dense, metric=self._metric
            )
            self._writer.front(index, figure)
        self._advance(1)

    def close(self) -> None:
        self._writer.close()

    @property
    def _best(self) -> Mapping[str, Any]:
        return max(self._trials, key=lambda trial: float(trial["reward"]))

    def _advance(self, steps: int) -> None:
        best = self._best if self._trials else None
        said = f"best {self._metric.text(best['score'])} at {best['speedup']:.2f}x" if best else ""
        self._bar.advance(steps, said)
