"""TensorBoard: what a search did, trial by trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard import summary as summaries

from autoprune.metric import ACCURACY, Metric
from autoprune.report.data import TrialRow
from autoprune.report.plots import pixels, sparsity_figure


class TrialWriter:
    """Writes a search's trials as they come; a resumed search goes on in the same folder.

    The folder is opened by the first thing written. What an interrupted run wrote at or after that trial is
    marked as void, so nothing shows twice.

    Args:
        directory: one run in TensorBoard.
        config: shown as text, once.
        logged: the trials of an earlier, interrupted run, in order; they are not written again.
        metric: how scores read.
    """

    def __init__(
        self,
        directory: Path,
        config: str = "",
        logged: Sequence[TrialRow] = (),
        metric: Metric = ACCURACY,
    ) -> None:
        self._metric = metric
        self._directory, self._config, self._logged = directory, config, logged
        self._writer: SummaryWriter | None = None
        self._next = len(logged)
        self._best = float("-inf")

    def __enter__(self) -> TrialWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def trial(self, index: int, trial: TrialRow) -> None:
        """Writes one trial: ``reward``, its ``terms``, its choices, and the plan once more if it is the best so far.

        With the metric, ``latency_ms`` and ``speedup``, which one that failed has not.

        Args:
            index: of the trial in the search, counted from 0.
            trial: its row.
        """
        writer = self._open(index)
        self._next = index + 1
        score = None if trial.score is None else self._metric.figure(trial.score)
        named = {
            "latency_ms": trial.latency_ms,
            "speedup": trial.speedup,
            "reward": trial.reward,
            self._metric.tag: score,
        }
        figures = {name: value for name, value in named.items() if value is not None}
        for name, value in figures.items():
            writer.add_scalar(f"trial/{name}", value, index)
        for name, value in trial.terms.items():
            writer.add_scalar(f"reward/{name}", value, index)
        for kind, choices in {"sparsity": trial.sparsities, **trial.choices}.items():
            for name, value in choices.items():
                writer.add_scalar(f"tried_{kind}/{name}", value, index)
        if score is not None and trial.reward > self._best:
            self._best = trial.reward
            for name, value in figures.items():
                writer.add_scalar(f"best/{name}", value, index)
            self.plan(index, trial.sparsities)
        if math.isfinite(self._best):
            writer.add_scalar("trial/best_reward", self._best, index)
        writer.flush()

    def plan(self, index: int, sparsities: Mapping[str, float]) -> None:
        """Writes a plan's sparsity, a scalar a layer and an image."""
        writer = self._open(index)
        for name, value in sparsities.items():
            writer.add_scalar(f"sparsity/{name}", value, index)
        writer.add_image("plan", pixels(sparsity_figure(sparsities)), index, dataformats="HWC")

    def learning(self, index: int, figures: Mapping[str, float]) -> None:
        """Writes figures of a learner, or of what trials are compared with, by their tags, after a trial."""
        writer = self._open(index)
        for tag, value in figures.items():
            writer.add_scalar(tag, value, index)

    def training(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Writes what a training method shows of itself after a step, counted from 1."""
        writer = self._open(step)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        for name, values in histograms.items():
            writer.add_histogram(name, values.detach().float(), step)

    def front(self, index: int, figure: Figure) -> None:
        """Writes the accuracy-latency figure (`autoprune.report.plots.front_figure`)."""
        self._open(index).add_image("front", pixels(figure), index, dataformats="HWC")

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Writes the row of this run in the table of hyper-parameters."""
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in values.items()
        }
        measured = {f"final/{name}": value for name, value in metrics.items()}
        writer: Any = self._open(self._next)
        # `add_hparams` would write to a second event file, which a resumed run could not mark as void for sure.
        for summary in summaries.hparams(plain, measured):
            writer.file_writer.add_summary(summary)
        for name, value in measured.items():
            writer.add_scalar(name, value, self._next)

    def close(self) -> None:
        """Writes what is left to the disk."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, index: int) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._directory), purge_step=index)
            self._best = max(
                (trial.reward for trial in self._logged[:index] if trial.score is not None), default=float("-inf")
            )
            if index == 0 and self._config:
                self._writer.add_text("config", f"```\n{self._config}\n```", 0)
        return self._writer


class FamilyWriter:
    """Writes a generalist's training: tasks it learns from, those that choose and those held out, apart.

    Args:
        directory: one run in TensorBoard.
        done: updates an earlier, interrupted training has written; what it wrote after them is marked as void.
    """

    def __init__(self, directory: Path, done: int = 0) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=done or None)

    def update(self, index: int, advantages: Sequence[float], surrogate_errors: Sequence[float]) -> None:
        """Means over the episodes of one update; those of nothing are left out."""
        for name, values in {"learned/advantage": advantages, "surrogate/error": surrogate_errors}.items():
            if values:
                self._writer.add_scalar(name, sum(values) / len(values), index)

    def judgement(self, index: int, learned: float, choosing: float, held_out: float) -> None:
        """Mean advantages of the policy without exploration."""
        for name, value in {"learned": learned, "choosing": choosing, "held_out": held_out}.items():
            self._writer.add_scalar(f"{name}/policy_advantage", value, index)

    def close(self) -> None:
        self._writer.close()
