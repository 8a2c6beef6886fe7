"""What a user sees of a search while it runs: the progress bar and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from autoprune.envs.trial import Trial
from autoprune.evaluation.measurement import Measurement
from autoprune.metric import Metric
from autoprune.plan import Plan
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
    row = TrialRow(trial.reward, asdict(trial.terms), sparsities, choices=_choices(trial.plan))
    if trial.failed:
        return row
    measured = trial.measurement
    return replace(row, score=measured.score, latency_ms=measured.latency_ms, speedup=measured.speedup)


def _choices(plan: Plan) -> dict[str, dict[str, float]]:
    """The numbers of a plan beside its sparsities."""
    sizes = {name: layer.pattern.args.get("size") for name, layer in plan.layers.items()}
    recipe = {**plan.training.args, **plan.settings}
    return {
        "group_size": {name: float(size) for name, size in sizes.items() if isinstance(size, int)},
        "recipe": {name: float(value) for name, value in recipe.items() if isinstance(value, (int, float))},
    }


class SearchMonitor:
    """Shows trials as they come; `resumed` comes first, once, with those of an interrupted search.

    Trials that failed have a reward, and no place in the picture. `shown` says a measurement in a few words; `first` is
    the best plan that was there before; `references` are rewards of rules, which trials are to be above.
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
        references: Mapping[str, float] | None = None,
    ) -> None:
        self._directory, self._config, self._metric, self._dense, self._bar = directory, config, metric, dense, bar
        self._shown = shown
        self._first = [] if first is None else [first]
        self._references = {f"reference/{rule}": reward for rule, reward in (references or {}).items()}
        self._trials: list[Trial] = []  # that succeeded
        self._last, self._pictured = -1, -1  # of the trials that were shown, and of those in a picture
        self._writer = TrialWriter(directory, config, metric=metric)

    def resumed(self, trials: Sequence[Trial]) -> None:
        self._writer = TrialWriter(self._directory, self._config, list(map(trial_row, trials)), self._metric)
        self._trials = [trial for trial in trials if not trial.failed]
        self._advance(len(trials))

    def trial(self, index: int, trial: Trial) -> None:
        if not trial.failed:
            self._trials.append(trial)
        self._writer.trial(index, trial_row(trial))
        self._writer.learning(index, self._references)
        self._last = index
        if index % FRONT_EVERY == FRONT_EVERY - 1:
            self._picture()
        self._advance(1)

    def learning(self, index: int, figures: Mapping[str, float]) -> None:
        """Shows what a learner tells of itself after a trial."""
        self._writer.learning(index, figures)

    def close(self) -> None:
        self._picture()
        self._writer.close()

    def _picture(self) -> None:
        """Writes the front, unless it has not changed."""
        if self._trials and self._pictured < self._last:
            best, points = point(self._best.measurement), [point(trial.measurement) for trial in self._trials]
            self._writer.front(self._last, front_figure(points, best, self._dense, metric=self._metric))
            self._pictured = self._last

    @property
    def _best(self) -> Trial:
        return max([*self._first, *self._trials], key=lambda trial: trial.rank)

    def _advance(self, steps: int) -> None:
        best = self._best.measurement if self._first or self._trials else None
        message = f"best {self._shown(best)}" if best else ""
        self._bar.advance(steps, message)
