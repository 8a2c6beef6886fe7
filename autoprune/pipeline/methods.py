"""Training methods side by side: the same target, a run each, and one table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from autoprune.config import Config
from autoprune.errors import AutopruneError, InUse
from autoprune.files import read_json, write_json, write_text
from autoprune.latency.timer import Clock
from autoprune.pipeline.results import report_of
from autoprune.pipeline.run import Run
from autoprune.progress import SILENT, Progress
from autoprune.report.data import MethodRow
from autoprune.report.run_report import write_report
from autoprune.report.stored import EAGER, REPACKED, missed, row_of
from autoprune.report.table import methods_table
from autoprune.training import TRAINING

ABOUT = """\
Each method pruned and trained the same dense model to the same target, in a run of its own, whose report is in the
folder of its name. The score is on the test split, after training. *vs best dense* and *speed-up* are the repacked
model's, over the fastest dense engine and over dense torch eager, timed in turns with them in that run. *Weights kept*
are parameters that are not zero, as a share of the dense model's. *Minutes* are those of training and repacking, of all
attempts where the target was missed at first.
"""
_SHARED = ("latency.json", "baselines.json")  # measured of the dense model, which all runs have in common


def compare_methods(
    configs: Mapping[str, Config], directory: Path, progress: Progress = SILENT, clock: Clock = time.perf_counter
) -> str:
    """Prunes without a search once by each config, all of one task and target, and writes ``methods.md``.

    What is done already is not done again. The page is written anew after each method.

    Args:
        configs: of the runs, which differ in the training method alone, by the name of a folder of `directory`.
        directory: of the comparison.
        progress: where long work is shown.
        clock: seconds; of all timing.

    Returns:
        The page as markdown. A method that cannot do it has a row that says why.

    Raises:
        ConfigError: there is no such method.
        InUse: another process, or another thread, writes in a run's directory.
        AutopruneError: no method can do it; the error is the first one's.
    """
    for config in configs.values():
        TRAINING.get(config.finetune.method.name)
    page, rows, errors = "", list[MethodRow](), list[AutopruneError]()
    for number, (name, config) in enumerate(configs.items(), start=1):
        progress.say(f"method {number} of {len(configs)}: {name}")
        try:
            run = Run(config, directory / name, progress=progress, clock=clock)
            with closing(run.lock):
                rows.append(_pruned(run, directory, clock))
                title = f"{run.task.name}: {config.target.text(run.task.metric)}"
                page = f"# {title}\n\n{ABOUT}\n{methods_table(rows, run.task.metric)}"
        except InUse:
            raise
        except AutopruneError as error:
            progress.say(f"{name} cannot do it: {error}")
            errors.append(error)
            rows.append(MethodRow(name, remark=f"cannot do it: {error}"))
        else:
            write_text(directory / "methods.md", page)
    if not page:
        raise errors[0]
    return page


def _pruned(run: Run, directory: Path, clock: Clock) -> MethodRow:
    """A method's row; its run is made, or gone on with, where it is not complete."""
    _share_measurements(run, directory)
    time_file = run.directory / "minutes.json"
    if not run.complete:
        run.plan_uniformly()
        before, began = _minutes(time_file), clock()
        try:
            run.settle()
            _ = run.repacked
        finally:  # also of what was stopped
            write_json(time_file, {"minutes": before + (clock() - began) / 60})
    report = report_of(run)
    write_report(report)
    remark = "; ".join(missed(report.rows, run.config.target, run.task.metric))
    dense, fast = row_of(report.rows, EAGER), row_of(report.rows, REPACKED)
    return MethodRow(
        method=run.directory.name,
        score=fast.score,
        speedup_over_best=fast.speedup_over_best,
        speedup=fast.speedup,
        kept=(fast.parameters or 0) / (dense.parameters or 1),
        minutes=_minutes(time_file),
        remark=f"missed: {remark}" if remark else run.unpruned and f"nothing was pruned: {run.unpruned} by repacking",
    )


def _share_measurements(run: Run, directory: Path) -> None:
    """Gives a run what another one measured of the dense model: it takes a while, and one target is one target."""
    _ = run.prepared  # claims the directory
    for name in _SHARED:
        known = next(iter(sorted(directory.glob(f"*/{name}"))), None)
        if known is not None and not (run.directory / name).exists():
            shutil.copyfile(known, run.directory / name)


def _minutes(path: Path) -> float:
    return float(read_json(path, "the minutes that were trained")["minutes"]) if path.exists() else 0.0
