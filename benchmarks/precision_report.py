"""The rows of `python -m benchmarks precision`, and its page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprune.report.table import markdown_table, mean_and_spread
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import Row

DENSE = "dense"
PRECISIONS = ("float32", "int8")
HEADER = (
    "sparsity", "pattern", "float32", "int8", "int8 - float32, points", "float32, ms", "int8, ms", "int8 is faster",
    "than dense int8",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome(Row):
    """One model in every precision.

    Attributes:
        seed: of the task, its model and its training.
        task: row of the table of tasks.
        pattern: of its masks; DENSE without any.
        sparsity: asked for.
        zeros: the least share of zeros of a layer that was pruned.
        scores: precision -> accuracy on the test split, in [0, 1].
        times_ms: precision -> median of one sample on one thread, timed in turns.
    """

    seed: int
    task: str
    pattern: str
    sparsity: float
    zeros: float
    scores: Mapping[str, float]
    times_ms: Mapping[str, float]

    @property
    def key(self) -> tuple[int, str, str, float]:
        return self.seed, self.task, self.pattern, self.sparsity

    def __str__(self) -> str:
        return ", ".join(f"{name} {100 * self.scores[name]:.2f}% {self.times_ms[name]:.3f} ms" for name in PRECISIONS)


def report(rows: Sequence[tuple[Outcome, Provenance | None]]) -> str:
    """The page: a table for each task, a line for each pattern and sparsity."""
    latest = {row.key: (row, made) for row, made in rows}
    machines = Machines(made for _, made in latest.values())
    outcomes = [row for row, _ in latest.values()]
    parts = []
    for task in dict.fromkeys(each.task for each in outcomes):
        of_task = [each for each in outcomes if each.task == task]
        seeds = len({each.seed for each in of_task})
        parts += [f"## {task}, {seeds} seed{'s' * (seeds > 1)}", markdown_table(HEADER, table(of_task), left=2)]
    return page(
        "Precision",
        "precision",
        "Accuracy on the test split of models pruned and fine-tuned in float32, then repacked in float32 or, after "
        "calibration, in int8; nothing is trained for int8. Milliseconds: one sample, one thread, the two in turns, "
        "median; means over the seeds. The last column: how many times faster than the dense model in int8.",
        *parts,
        machines.legend(),
    )


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The lines of one task, the dense model first, then from sparsity to sparsity."""
    variants = dict.fromkeys((each.sparsity, each.pattern) for each in sorted(outcomes, key=lambda each: each.sparsity))
    dense = {each.seed: each.times_ms["int8"] for each in outcomes if each.pattern == DENSE}
    lines = []
    for sparsity, pattern in variants:
        found = [each for each in outcomes if (each.sparsity, each.pattern) == (sparsity, pattern)]
        scores = {name: [100 * each.scores[name] for each in found] for name in PRECISIONS}
        times = {name: [each.times_ms[name] for each in found] for name in PRECISIONS}
        change = [int8 - whole for whole, int8 in zip(*(scores[name] for name in PRECISIONS), strict=True)]
        gain = [whole / int8 for whole, int8 in zip(*(times[name] for name in PRECISIONS), strict=True)]
        over = [dense[each.seed] / each.times_ms["int8"] for each in found if each.seed in dense]
        lines.append(
            [
                f"{100 * sparsity:g}%",
                pattern,
                *(f"{mean_and_spread(scores[name])}%" for name in PRECISIONS),
                mean_and_spread(change, "+.2f"),
                *(f"{statistics.fmean(times[name]):.3f}" for name in PRECISIONS),
                *(f"{statistics.fmean(ratios):.2f}x" if ratios else "-" for ratios in (gain, over)),
            ]
        )
    return lines
