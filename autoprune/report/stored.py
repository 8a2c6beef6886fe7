"""A run's report from what its directory holds alone: plain data, so that reading a directory never runs its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from autoprune.errors import FileError
from autoprune.files import read_json, write_bytes, write_json, write_text
from autoprune.latency.timer import speedup
from autoprune.metric import Metric
from autoprune.model.inventory import KeptDense
from autoprune.precision import RunPrecision
from autoprune.report.data import ContenderRow, MeasuredPoint, PlanRow, Report, ResultRow, SearchRow
from autoprune.report.html import html_page
from autoprune.report.page import report_page
from autoprune.report.plots import front_figure, png_of, reward_figure, sparsity_figure
from autoprune.target import Target, baseline_name

EAGER = "dense, torch eager"
WHOLE = "dense, repacked"
MASKED = "masked"
REPACKED = "repacked"  # bound to its inputs, as the engines are
CALLED = "repacked, called anew"  # as a module is called in Python
MISSED = 0.03  # a figure this much short is within the timer's noise


@dataclass(frozen=True)
class Results:
    """The final table, ``results.json``: its rows, how they were timed and on what machine."""

    rows: tuple[ResultRow, ...]
    protocol: Mapping[str, Any]
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Front:
    """The trials of a search and what stands out among them; `uniform` is None where no such plan was as fast."""

    trials: tuple[MeasuredPoint, ...]
    best: MeasuredPoint
    dense: MeasuredPoint
    uniform: MeasuredPoint | None


@dataclass(frozen=True)
class Record:
    """What a report says beside the final table, ``report.json``.

    Attributes:
        title, facts, plan, kept_dense, searches, contenders, metric: as of `Report`.
        target: what was asked for.
        sparsities: of each layer in the end.
        front: of the search; None where there was none.
        rewards: of the search's trials, by agent.
        unpruned: what repacking alone gives, where nothing was pruned for that.
        precision: that the model was repacked in.
        device: that latency was measured on, where that runs no torch; None: the machine of the run.
    """

    title: str
    facts: Mapping[str, Any]
    target: Target
    metric: Metric
    plan: tuple[PlanRow, ...]
    kept_dense: tuple[KeptDense, ...]
    searches: tuple[SearchRow, ...]
    sparsities: Mapping[str, float]
    front: Front | None = None
    rewards: Mapping[str, tuple[float, ...]] | None = None
    unpruned: str | None = None
    contenders: tuple[ContenderRow, ...] = ()
    precision: RunPrecision = "float32"
    device: str | None = None


Stored = TypeVar("Stored", Results, Record)


def write_stored(path: Path, stored: Results | Record) -> None:
    """Writes one of them as JSON, which has no infinity: a metric's open ends are what it has by default."""
    write_json(path, asdict(stored, dict_factory=lambda items: {k: v for k, v in items if v not in (inf, -inf)}))


def read_stored(kind: type[Stored], path: Path, what: str) -> Stored:
    """Reads one of them; raises FileError where it is missing or corrupt."""
    try:
        return TypeAdapter(kind).validate_python(read_json(path, what))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FileError(
            f"{what} is corrupt: {path} ({place}: {first['msg']}). Delete the file to make it anew."
        ) from None


def write_page(directory: Path) -> str:
    """Writes the report from the directory's ``results.json`` and ``report.json``.

    It is written as markdown (``report.md``, with its figures beside it) and as one HTML file (``report.html``).

    Returns:
        The page as markdown.

    Raises:
        FileError: a file is missing or corrupt.
    """
    path = directory / "report.json"
    if directory.is_dir() and not path.exists():
        raise FileError(
            f"{directory} has no report yet ({path.name} not found): give the command that made the directory again, "
            "such as 'autoprune run CONFIG --run-dir DIR'; it goes on where it was and ends with the report."
        )
    record = read_stored(Record, path, "the record of the run")
    results = read_stored(Results, directory / "results.json", "the results")
    figures = _draw(record)
    page = report_page(
        Report(
            title=record.title,
            headline=headline(results.rows, record),
            facts=record.facts,
            results=results.rows,
            plan=record.plan,
            kept_dense=record.kept_dense,
            searches=record.searches,
            contenders=record.contenders,
            protocol=results.protocol,
            machine=results.machine,
            figures={caption: name for caption, (name, _) in figures.items()},
            metric=record.metric,
        )
    )
    for name, png in figures.values():
        write_bytes(directory / name, png)
    write_text(directory / "report.html", html_page(page, dict(figures.values())))
    write_text(directory / "report.md", page)  # last: with it the run is complete
    return page


def row_of(rows: tuple[ResultRow, ...], name: str) -> ResultRow:
    """The row of that name; raises FileError where the table has none."""
    for row in rows:
        if row.name == name:
            return row
    raise FileError(f"the results are corrupt: they have no row {name!r}. Delete results.json to measure again.")


def headline(rows: tuple[ResultRow, ...], record: Record) -> str:
    """The result in a few sentences; what was missed, and that nothing was pruned, stands first."""
    metric, unpruned, device = record.metric, record.unpruned, record.device
    best = baseline_name("best" if device is None else "repacked", record.precision)
    dense, fast = row_of(rows, EAGER), row_of(rows, REPACKED)
    if fast.score is None or dense.score is None or fast.speedup_over_best is None:
        raise FileError("the results are corrupt: the dense or the repacked row lacks figures. Delete results.json.")
    text = ""
    if unpruned is not None:
        text += f"**Nothing was pruned**: {unpruned} without pruning, by repacking alone. Ask for more than that. "
    if misses := missed(rows, record):
        text += f"**The target was missed**: {'; '.join(misses)}. "
    drop = dense.score - fast.score
    text += f"The repacked model is **{fast.speedup_over_best:.2f}x** as fast as {best}, timed in the same run"
    text += f" on {device}" if device is not None else ""
    text += f", and {fast.speedup:.2f}x as fast as dense torch eager" if fast.speedup is not None else ""
    text += f", {metric.change(drop)}."
    called = next((row.speedup_over_best for row in rows if row.name == CALLED), None)
    if called is not None:
        text += (
            f" That is bound to its inputs (`fast.bind`), as the engines are; called as a module it is {called:.2f}x."
        )
    if fast.speedup_over_best < 1.0:
        text += f" {best[0].upper()}{best[1:]} is faster than the repacked model: prefer it for this model."
    return text


def missed(rows: tuple[ResultRow, ...], record: Record) -> list[str]:
    """What of the target the final table does not confirm, a sentence each; times within the timer's noise count."""
    target, metric = record.target, record.metric
    dense, fast = row_of(rows, EAGER), row_of(rows, REPACKED)
    misses = []
    over = _over(rows, target)
    if target.speedup is not None and over < target.speedup * (1 - MISSED):
        misses.append(f"{over:.2f}x of {target.speedup:g}x over {baseline_name(target.over, record.precision)}")
    took = fast.latency.median_ms if fast.latency is not None else 0.0
    if target.latency_ms is not None and took > target.latency_ms * (1 + MISSED):
        misses.append(f"{took:.4g} ms of at most {target.latency_ms:g} ms")
    if target.size_bytes is not None and (fast.size_bytes or 0) > target.size_bytes:
        misses.append(f"{fast.size_bytes:,} bytes of at most {target.size_bytes:,}")
    drop = (dense.score or 0.0) - (fast.score or 0.0)
    if target.accuracy_drop is not None and drop > target.accuracy_drop:
        misses.append(f"{metric.change(drop)}, where at most {metric.allowance(target.accuracy_drop)} was allowed")
    return misses


def _over(rows: tuple[ResultRow, ...], target: Target) -> float:
    """The repacked model's speed-up over what the target's is over."""
    fast = row_of(rows, REPACKED)
    if target.over == "repacked":
        whole = row_of(rows, WHOLE).latency
        return 0.0 if whole is None or fast.latency is None else speedup(whole, fast.latency)
    return (fast.speedup if target.over == "eager" else fast.speedup_over_best) or 0.0


def _draw(record: Record) -> dict[str, tuple[str, bytes]]:
    """Draws the figures; caption -> file name and PNG."""
    figures = {"Sparsity of each layer": ("sparsity.png", png_of(sparsity_figure(record.sparsities)))}
    if record.front is not None:
        front, metric = record.front, record.metric
        figure = front_figure(front.trials, front.best, front.dense, front.uniform, metric)
        figures[f"{metric.name.capitalize()} and latency of every trial"] = ("front.png", png_of(figure))
    if record.rewards is not None:
        figures["Reward"] = ("reward.png", png_of(reward_figure(record.rewards)))
    return figures
