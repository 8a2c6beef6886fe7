"""Sweeps: a row a point of a grid, kept as soon as it is measured, so that a sweep that was stopped goes on."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from autoprune.errors import FileError
from autoprune.files import append_line, read_lines
from autoprune.progress import Progress
from benchmarks.lib.provenance import Provenance

PROVENANCE = "provenance"


@dataclass(frozen=True)
class Row:
    """What was measured at one point; a frozen dataclass of plain values, unless it says how it becomes JSON."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """The point: a row with the same key replaces an earlier one."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)


AnyRow = TypeVar("AnyRow", bound=Row)
Point = TypeVar("Point", bound=Hashable)


@dataclass(frozen=True)
class Rows(Generic[AnyRow]):
    """The rows of one kind in a file of JSON lines; each line also holds the commit, the machine and the versions.

    Attributes:
        path: of the file, which need not exist.
        kind: of the rows.
    """

    path: Path
    kind: type[AnyRow]

    def read(self) -> list[tuple[AnyRow, Provenance | None]]:
        """All rows as they were added, each with its provenance: None for one from before rows had any.

        Raises:
            FileError: the file is damaged, or holds something else.
        """
        found = []
        for line in read_lines(self.path, "the file of results"):
            made = line.pop(PROVENANCE, None)
            try:
                found.append((self.kind.from_json(line), made and Provenance(**made)))
            except (KeyError, TypeError) as error:
                raise FileError(
                    f"{self.path} is not what this benchmark writes ({error!r}). Delete it to measure again."
                ) from None
        return found

    def last(self) -> dict[Hashable, AnyRow]:
        """The last row of each key, in the order in which the keys were first measured."""
        return {row.key: row for row, _ in self.read()}

    def add(self, row: AnyRow) -> None:
        """Appends a row, flushed to the disk."""
        append_line(self.path, {**row.to_json(), PROVENANCE: Provenance.here().to_json()})


def seed_by_seed(seeds: int, *axes: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The grid of all axes, as ``(seed, ...)``: one seed after the other, so that a first table is there early."""
    return itertools.product(range(seeds), *axes)


def missing(rows: Rows[AnyRow], points: Iterable[Point], redo: bool = False) -> list[Point]:
    """The points without a row, in order; all of them with `redo`."""
    done = {} if redo else rows.last()
    return [point for point in points if point not in done]


def sweep(
    rows: Rows[AnyRow],
    points: Sequence[Point],
    measure: Callable[[Point], AnyRow],
    progress: Progress,
    *,
    note: Callable[[AnyRow], str] = lambda row: "",
    pool: Executor | None = None,
) -> int:
    """Measures the points; every row is kept as soon as it is there, whatever happens to the others.

    Args:
        rows: where they are kept.
        points: what to measure, of `missing`.
        measure: makes the row of a point; can be pickled where there is a pool of processes.
        progress: gets a line for what failed, and a bar.
        note: a few words on a row, beside the bar.
        pool: measures several at a time; without it one after the other, here.

    Returns:
        How many points failed. One bug must not cost the hours of the other points, so its error is only told.

    Raises:
        KeyboardInterrupt: it was stopped; the same sweep goes on from there.
    """
    failed = 0
    progress.say(f"{len(points)} to be measured; rows are kept in {rows.path}")
    with progress.bar("points", len(points)) as bar:
        for point, result in _results(points, measure, pool):
            told = str(point)
            try:
                row = result()
                rows.add(row)
                told += f": {said}" if (said := note(row)) else ""
            except Exception as error:
                failed += 1
                progress.say(f"failed: {point}: {type(error).__name__}: {error}")
            bar.advance(note=told)
    return failed


def _results(
    points: Sequence[Point], measure: Callable[[Point], AnyRow], pool: Executor | None
) -> Iterator[tuple[Point, Callable[[], AnyRow]]]:
    """Each point with what gives its row, or raises its error."""
    if pool is None:
        for point in points:
            yield point, lambda point=point: measure(point)  # type: ignore[misc]
        return
    waiting = {pool.submit(measure, point): point for point in points}
    try:
        for future in as_completed(waiting):
            yield waiting[future], future.result
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
