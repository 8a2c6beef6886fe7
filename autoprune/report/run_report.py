"""Writing the report of a run: its record, the row of hyper-parameters in TensorBoard, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.report.data import ResultRow
from autoprune.report.stored import REPACKED, Record, row_of, write_page, write_stored
from autoprune.report.tensorboard import TrialWriter


@dataclass(frozen=True)
class RunReport:
    """All that the report of a run is written from.

    Attributes:
        directory: of the run; its ``results.json`` holds the rows.
        rows: the final table.
        record: what the page and its figures show beside that.
        hparams: the run's row in TensorBoard's table of hyper-parameters.
    """

    directory: Path
    rows: tuple[ResultRow, ...]
    record: Record
    hparams: Mapping[str, Any]


def write_report(report: RunReport) -> str:
    """Writes ``report.json``, and from it ``report.md``, its figures and ``report.html``, and returns the page.

    Raises:
        FileError: the rows lack the repacked model's, or the directory its ``results.json``.
    """
    write_stored(report.directory / "report.json", report.record)
    fast, metric = row_of(report.rows, REPACKED), report.record.metric
    figures = {metric.tag: metric.figure(fast.score or 0.0), "speedup": fast.speedup or 0.0}
    with TrialWriter(report.directory / "tensorboard" / "final") as writer:
        writer.hparams(report.hparams, figures)
    return write_page(report.directory)
