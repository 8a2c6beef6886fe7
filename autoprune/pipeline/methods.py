"""Training methods side by side: the same target, a run each, and one table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoprune.config import Config
from autoprune.errors import AutopruneError, InUse
from autoprune.files import read_json, write_json, write_text
from autoprune.latency.timer import Clock
from autoprune.pipeline.baselines import BASELINES_FILE
from autoprune.pipeline.results import report_of
from autoprune.pipeline.run import Run
from autoprune.progress import SILENT, Progress
from autoprune.report.data import MethodRow
from autoprune.report.run_report import RunReport, write_report
from autoprune.report.stored import EAGER, REPACKED, WHOLE, missed, row_of
from autoprune.report.table import methods_table
from autoprune.training import TRAINING

ABOUT = """\
Each method pruned and trained the same dense model to the same target, in a run of its own, whose report is in the
folder of its name. The score is on the test split, after training. *vs best dense* and *speed-up* are the repacked
model's, over the fastest dense engine and over dense torch eager, timed in turns with them in that run. *Weights kept*
are parameters that are not zero, as a share of the dense model's. *Minutes* are those of training and repacking, of all
attempts where the target was missed at first.
"""
_TIME = "minutes.json"


@dataclass(frozen=True)
class Comparison:
    """Training methods side by side.

    Attributes:
        directory: with a run each in a folder of its name, and the page.
        rows: a method each, in the order in which they were asked for.
        page: as markdown, with the dense model repacked beside them.
    """

    directory: Path
    rows: tuple[MethodRow, ...]
    page: str

    @property
    def missed(self) -> bool:
        """Whether a method missed the target, or cannot do it."""
        return any(row.missed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """All but the page as plain data."""
        return {
            "reached": not self.missed,
            "methods": [asdict(row) for row in self.rows],
            "run_dir": str(self.directory),
        }


def compare_methods(
    configs: Mapping[str, Config], directory: Path, progress: Progress = SILENT, clock: Clock = time.perf_counter
) -> Comparison:
    """Prunes without a search once by each config, all of one task and target, and writes ``methods.md``.

    What is done already is not done again. The page is written after each method.

    Args:
        configs: of the runs, which differ in the training method alone, by the name of a folder of `directory`.
        directory: of the comparison.
        progress: where long work is shown.
        clock: seconds; of all timing.

    Returns:
        The comparison. A method that cannot do it has a row that says why.

    Raises:
        ConfigError: there is no such method.
        InUse: another process, or another thread, writes in a run's directory.
        AutopruneError: no method can do it; the error is the first one's.
    """
    for config in configs.values():
        TRAINING.get(config.finetune.method.name)
    rows, errors = list[MethodRow](), list[AutopruneError]()
    done: RunReport | None = None  # of the last method that can
    for number, (name, config) in enumerate(configs.items(), start=1):
        progress.say(f"method {number} of {len(configs)}: {name}")
        try:
            run = Run(config, directory / name, progress=progress, clock=clock)
            with closing(run.lock):
                done = _made(run, directory, clock)
                rows.append(_row(name, done))
        except InUse:
            raise
        except AutopruneError as error:
            progress.say(f"{name} cannot do it: {error}")
            errors.append(error)
            rows.append(MethodRow(name, remark=f"cannot do it: {error}", missed=True))
        if done is not None:
            write_text(directory / "methods.md", _page(done, rows))
    if done is None:
        raise errors[0]
    return Comparison(directory, tuple(rows), _page(done, rows))


def _page(report: RunReport, rows: Sequence[MethodRow]) -> str:
    """The page as markdown; the dense model, repacked, is what there is without pruning."""
    dense = row_of(report.rows, WHOLE)
    unpruned = MethodRow(dense.name, dense.score, dense.speedup_over_best, dense.speedup, 1.0)
    return f"# {report.record.title}\n\n{ABOUT}\n{methods_table([unpruned, *rows], report.record.metric)}"


def _made(run: Run, directory: Path, clock: Clock) -> RunReport:
    """Makes the run, or goes on with it, and writes its report."""
    _share_baselines(run, directory)
    if not run.complete:
        run.plan_uniformly()
        before, began = _minutes(run.directory), clock()
        try:
            run.settle()
            _ = run.repacked
        finally:  # also of what was stopped
            write_json(run.directory / _TIME, {"minutes": before + (clock() - began) / 60})
    report = report_of(run)
    write_report(report)
    return report


def _row(name: str, report: RunReport) -> MethodRow:
    dense, fast, record = row_of(report.rows, EAGER), row_of(report.rows, REPACKED), report.record
    misses = "; ".join(missed(report.rows, record))
    remark = f"missed: {misses}" if misses else None
    if record.unpruned is not None:
        remark = f"nothing was pruned: {record.unpruned} by repacking alone"
    kept, minutes = (fast.parameters or 0) / (dense.parameters or 1), _minutes(report.directory)
    return MethodRow(name, fast.score, fast.speedup_over_best, fast.speedup, kept, minutes, remark, bool(misses))


def _share_baselines(run: Run, directory: Path) -> None:
    """Gives a run what another one measured of the dense engines: it takes a while, and one target is one target."""
    _ = run.prepared  # claims the directory
    known = next(iter(sorted(directory.glob(f"*/{BASELINES_FILE}"))), None)
    if known is not None and not (run.directory / BASELINES_FILE).exists():
        shutil.copyfile(known, run.directory / BASELINES_FILE)


def _minutes(directory: Path) -> float:
    path = directory / _TIME
    return float(read_json(path, "the minutes that were trained")["minutes"]) if path.exists() else 0.0
