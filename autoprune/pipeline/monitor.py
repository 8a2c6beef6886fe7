"""What a user sees of a search while it runs: the progress bar and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from autoprune.envs.trial import Trial
from autoprune.evaluation.measurement import Measurement
from autoprune.metric import Metric
from autoprune.progress import Bar
from autoprune.report.data import MeasuredPoint, TrialRow
from autoprune.report.plots import front_figure
from autoprune.report.tensorboard import TrialWriter

FRONT_EVERY = 25  # trials between two pictures of the front


def point(measured: Measurement) -> MeasuredPoint:
    """A measured plan in the plane of score and latency."""
    return MeasuredPoint(measured.latency_ms, measured.score)


def trial_row(trial: Trial) -> TrialRow:
    """A trial as TensorBoard shows it."""
    sparsities = {name: layer.sparsity for name, layer in trial.plan.layers.items()}
    row = TrialRow(trial.reward, asdict(trial.terms), sparsities)
    if trial.failed:
        return row
    measured = trial.measurement
    return replace(row, score=measured.score, latency_ms=measured.latency_ms, speedup=measured.speedup)


class SearchMonitor:
    """Shows trials as they come; `resumed` comes first, once, with those of an interrupted search.

    Trials that failed have a reward, and no place in the picture. `shown` says a measurement in a few words; `first` is
    the best plan that was there before.
    """

    def __init__(
        self,
        directory: Path,
        config: str,
        metric: Metric,
        dense: MeasuredPoint,
        bar: Bar,
        shown: Callable[[Measurement], str],
        first: Trial | None = None,
    ) -> None:
        self._directory, self._config, self._metric, self._dense, self._bar = directory, config, metric, dense, bar
        self._shown = shown
        self._first = [] if first is None else [first]
        self._trials: list[Trial] = []  # that succeeded
        self._writer = TrialWriter(directory, config, metric=metric)

    def resumed(self, trials: Sequence[Trial]) -> None:
        self._writer = TrialWriter(self._directory, self._config, list(map(trial_row, trials)), self._metric)
        self._trials = [trial for trial in trials if not trial.failed]
        self._advance(len(trials))

    def trial(self, index: int, trial: Trial) -> None:
        if not trial.failed:
            self._trials.append(trial)
        self._writer.trial(index, trial_row(trial))
        if index % FRONT_EVERY == FRONT_EVERY - 1 and self._trials:
            figure = front_figure(
                [point(trial.measurement) for trial in self._trials],
                point(self._best.measurement),
                self._dense,
                metric=self._metric,
            )
            self._writer.front(index, figure)
        self._advance(1)

    def close(self) -> None:
        self._writer.close()

    @property
    def _best(self) -> Trial:
        return max([*self._first, *self._trials], key=lambda trial: trial.rank)

    def _advance(self, steps: int) -> None:
        best = self._best.measurement if self._first or self._trials else None
        message = f"best {self._shown(best)}" if best else ""
        self._bar.advance(steps, message)
