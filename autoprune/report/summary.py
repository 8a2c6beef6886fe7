"""The result of a run in a few figures, from what its directory holds: for scripts, and a last line in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.report.data import ResultRow
from autoprune.report.stored import CALLED, EAGER, REPACKED, Record, Results, headline, missed, read_stored, row_of


@dataclass(frozen=True)
class Summary:
    """What came of a run.

    Attributes:
        directory: of the run.
        rows: the final table.
        record: what the report says beside that.
    """

    directory: Path
    rows: tuple[ResultRow, ...]
    record: Record

    @classmethod
    def read(cls, directory: Path) -> Summary:
        """The summary of a finished run.

        Raises:
            FileError: its results or its record are missing or corrupt.
        """
        results = read_stored(Results, directory / "results.json", "the results")
        return cls(directory, results.rows, read_stored(Record, directory / "report.json", "the record of the run"))

    @property
    def missed(self) -> list[str]:
        """What of the target the final table does not confirm, a sentence each."""
        return missed(self.rows, self.record)

    @property
    def headline(self) -> str:
        """The result in a few sentences, as markdown."""
        return headline(self.rows, self.record)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data.

        Speed-ups are ratios, times milliseconds, scores higher when better; ``figure`` and ``dense_figure`` are the
        metric's, as the report shows it.
        """
        dense, fast, metric = row_of(self.rows, EAGER), row_of(self.rows, REPACKED), self.record.metric
        called = next((row for row in self.rows if row.name == CALLED), None)
        return {
            "reached": not self.missed,
            "missed": self.missed,
            "unpruned": self.record.unpruned,
            "target": self.record.target.to_json(),
            "precision": self.record.precision,
            "device": self.record.device,
            "speedup_over_best": fast.speedup_over_best,
            "speedup_over_eager": fast.speedup,
            "called_speedup_over_best": None if called is None else called.speedup_over_best,
            "latency_ms": None if fast.latency is None else fast.latency.median_ms,
            "size_bytes": fast.size_bytes,
            "metric": metric.name,
            "figure": None if fast.score is None else metric.figure(fast.score),
            "dense_figure": None if dense.score is None else metric.figure(dense.score),
            "score": fast.score,
            "dense_score": dense.score,
            "rows": [_row(row) for row in self.rows],
            "plan": str(self.directory / "plan.json"),
            "run_dir": str(self.directory),
        }


def _row(row: ResultRow) -> dict[str, Any]:
    """A row with the median and the percentiles of its times in place of all of them."""
    took = row.latency
    times = {} if took is None else {"latency_ms": took.median_ms, "p10_ms": took.p10_ms, "p90_ms": took.p90_ms}
    figures = {name: value for name, value in vars(row).items() if name != "latency" and value is not None}
    return {**figures, **times}
