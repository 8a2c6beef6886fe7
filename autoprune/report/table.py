"""Tables: markdown whose columns are aligned, so that it reads as well in a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import inf
from typing import Protocol

from rich.cells import cell_len

from autoprune.metric import ACCURACY, Metric
from autoprune.report.data import ContenderRow, MethodRow, PlanRow, ResultRow, SearchRow

MISSING = "-"


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, remarks: bool = False
) -> str:
    """Aligns `rows` under `header`: the first `left` columns to the left, the others (figures) to the right.

    With `remarks` the last column is text of any length: it is to the left, and its cells are not filled up.

    Raises:
        ValueError: a row is longer or shorter than the header.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(3, *(cell_len(value) for value in column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if at < left else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    if remarks:
        widths[-1], rule[-1] = 0, "---"
    return "\n".join(_line(row, widths, left) for row in (cells[0], rule, *cells[1:])) + "\n"


def mean_and_spread(values: Sequence[float], form: str = ".2f") -> str:
    """The mean, and of several values the standard deviation (of a sample), as a cell; `MISSING` for none.

    Args:
        values: in one unit.
        form: of the mean, e.g. ``+.2f`` to show its sign.
    """
    if not values:
        return MISSING
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def result_table(rows: Sequence[ResultRow], metric: Metric = ACCURACY) -> str:
    """The final table: the metric, latency, speed-ups, parameters, size; below it what was left out, and why.

    With the precision of each row and the signal-to-noise ratio of its output where one is not float32.
    """
    rounded = any(row.precision != "float32" for row in rows if row.left_out is None)
    header = (
        "model",
        *(("precision", "SNR dB") if rounded else ()),
        metric.name,
        "latency ms (p10-p90)",
        "speed-up",
        "vs best dense",
        "parameters",
        "size on disk",
    )
    cells = [
        (
            row.name,
            *((row.precision, decibels(row.snr_db)) if rounded else ()),
            MISSING if row.score is None else metric.text(row.score),
            MISSING if row.latency is None else str(row.latency),
            times(row.speedup),
            times(row.speedup_over_best),
            MISSING if row.parameters is None else f"{row.parameters:,}",
            size(row.size_bytes),
        )
        for row in rows
        if row.left_out is None
    ]
    return markdown_table(header, cells) + "".join(
        f"\n{row.name} left out: {row.left_out}\n" for row in rows if row.left_out is not None
    )


def plan_table(rows: Sequence[PlanRow]) -> str:
    """The plan layer by layer; the last row is the sparsity over all their weights."""
    rounded = any(row.precision != "float32" for row in rows)
    more = ROUNDED if rounded else ()
    header = ("layer", "pattern", "criterion", "backend", "weights", "sparsity", "dense us", "pruned us", *more)
    cells = [
        (
            row.layer,
            row.pattern,
            row.criterion,
            row.backend,
            f"{row.weights:,}",
            percent(row.sparsity, 1),
            microseconds(row.dense_us),
            microseconds(row.latency_us),
            *(rounding(row) if rounded else ()),
        )
        for row in rows
    ]
    weights = sum(row.weights for row in rows)
    zeros = sum(row.weights * row.sparsity for row in rows)
    total = ("all of these", "", "", "", f"{weights:,}", percent(zeros / max(1, weights), 1), "", "", *[""] * len(more))
    return markdown_table(header, [*cells, total], left=4)


def contender_table(rows: Sequence[ContenderRow], metric: Metric = ACCURACY) -> str:
    """The plans that were fine-tuned before one was chosen."""
    header = ("the plan of", "speed-up", f"{metric.name}, validation", f"{metric.name}, test")
    cells = [
        (
            f"{row.source}, chosen" if row.chosen else row.source,
            times(row.speedup),
            metric.text(row.validation),
            metric.text(row.test),
        )
        for row in rows
    ]
    return markdown_table(header, cells)


def search_table(rows: Sequence[SearchRow], metric: Metric = ACCURACY, over: str = "over eager") -> str:
    """The agent beside its rivals, each with the best plan of its own budget; `over` heads the speed-ups."""
    header = ("agent or rule", "evaluations", "best reward", metric.name, "latency ms", over)
    cells = [
        (
            row.agent,
            f"{row.episodes:,}",
            f"{row.reward:.4f}",
            metric.text(row.score),
            f"{row.latency_ms:.3f}",
            times(row.speedup),
        )
        for row in rows
    ]
    return markdown_table(header, cells)


def methods_table(rows: Sequence[MethodRow], metric: Metric = ACCURACY) -> str:
    """Training methods, the best score first, and last those that brought nothing."""
    header = ("method", metric.name, "vs best dense", "speed-up", "weights kept", "minutes", "remark")
    cells = [
        (
            row.method,
            MISSING if row.score is None else metric.text(row.score),
            times(row.speedup_over_best),
            times(row.speedup),
            percent(row.kept, 1),
            MISSING if row.minutes is None else f"{row.minutes:.2f}",
            row.remark or MISSING,
        )
        for row in sorted(rows, key=lambda row: inf if row.score is None else -row.score)
    ]
    return markdown_table(header, cells, remarks=True)


def percent(value: float | None, digits: int) -> str:
    """A fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def times(value: float | None) -> str:
    """A ratio, e.g. ``2.31x``."""
    return MISSING if value is None else f"{value:.2f}x"


def microseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.1f}"


def decibels(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


class Rounded(Protocol):
    """A layer of any precision."""

    @property
    def precision(self) -> str: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def snr_db(self) -> float | None: ...


ROUNDED = ("precision", "scale", "SNR dB")


def rounding(layer: Rounded) -> tuple[str, str, str]:
    """The cells of a layer under `ROUNDED`."""
    return layer.precision, MISSING if layer.scale is None else f"{layer.scale:.3g}", decibels(layer.snr_db)


def size(size_bytes: int | None) -> str:
    """Bytes in decimal units, e.g. ``1.25 MB``."""
    if size_bytes is None:
        return MISSING
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value, unit = size_bytes / 1e3, "kB"
    for larger in ("MB", "GB"):
        if value >= 999.5:
            value, unit = value / 1e3, larger
    return f"{value:.3g} {unit}"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    padded = [
        value + " " * (width - cell_len(value)) if at < left else " " * (width - cell_len(value)) + value
        for at, (value, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"
