"""README's main job, seed by seed: ``python -m benchmarks main_job [--seeds 0,1,2] [--busy]``.

`autoprune run digits`, whose contenders are the agent's plan and every rule's, in a process and a cache of its own, so
that everything is measured and trained anew. Shown of each run: how long it took, the speed-up over the best dense
engine, and the test accuracy of the dense model, of the chosen plan and of each rule's plan after the same training at
its own measured speed-up. Rows are kept in benchmarks/results/main_job.jsonl, the page is
benchmarks/results/main_job.md. ``--busy`` keeps one core busy meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoprune.agents.rules import KNAPSACK, POLICY, UNIFORM
from autoprune.pipeline.contest import read_contenders, winner
from autoprune.report.console import Console
from autoprune.report.table import MISSING, markdown_table, mean_and_spread
from benchmarks.lib.busy import busy_core
from benchmarks.lib.command_line import add_report, command_line, listed
from benchmarks.lib.page import page, write_page
from benchmarks.lib.sweep import Row, Rows, missing, sweep

AGENT = "auto"  # as the config has it
SOURCES = (AGENT, UNIFORM, KNAPSACK, POLICY)


@dataclass(frozen=True)
class Job(Row):
    """What one run came to; accuracies are shares of the test split.

    Attributes:
        seconds: of the command.
        speedup: over the best dense engine, in the final table.
        dense: accuracy of the dense model.
        accuracy: of the repacked model.
        chosen: whose plan it is.
        others: source -> accuracy of its plan, likewise fine-tuned; none of a plan that another source had, too.
    """

    seed: int
    busy: bool
    seconds: float
    speedup: float
    dense: float
    accuracy: float
    chosen: str
    others: Mapping[str, float]

    @property
    def key(self) -> tuple[int, bool]:
        return self.seed, self.busy


def main(argv: Sequence[str]) -> int:
    parser = command_line("main_job", __doc__)
    parser.add_argument("--seeds", type=listed(int), default=(0, 1, 2), help="default 0,1,2")
    parser.add_argument("--busy", action="store_true", help="another process keeps one core busy")
    add_report(parser)
    given = parser.parse_args(argv)
    rows = Rows(given.output / "main_job.jsonl", Job)
    points = [(seed, given.busy) for seed in given.seeds]
    failed = 0
    if not given.report:
        with busy_core(given.busy):
            failed = sweep(rows, missing(rows, points), _done, Console(), note=_note)
    write_page(given.output, "main_job", report(list(rows.last().values())))
    return 1 if failed else 0


def _note(row: Job) -> str:
    return f"{row.speedup:.2f}x, {100 * row.accuracy:.2f}% in {row.seconds:.0f} s"


def _done(point: tuple[int, bool]) -> Job:
    seed, busy = point
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "autoprune", "run", "digits", "--seed", str(seed), "--run-dir", str(run)]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--json", "--quiet"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "AUTOPRUNE_CACHE": f"{folder}/cache"},
        )
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        said, contenders = json.loads(done.stdout), read_contenders(run)
    chosen = winner(contenders).source
    others = {each.source: each.test for each in contenders}
    return Job(seed, busy, seconds, said["speedup_over_best"], said["dense_score"], said["score"], chosen, others)


def report(rows: Sequence[Job]) -> str:
    """The page: a table a state of the machine."""
    parts = []
    for busy in (False, True):
        if of := sorted((row for row in rows if row.busy == busy), key=lambda row: row.seed):
            parts.append("## While another process keeps one core busy" if busy else "## Without more load")
            header = ("seed", "seconds", "speed-up", "dense", "chosen plan", "accuracy", *(f"{x}'s" for x in SOURCES))
            parts.append(markdown_table(header, [*map(_cells, of), _mean(of)], left=1))
    about = (
        "`autoprune run digits` (asked for 2x over the best dense engine), everything measured and trained anew, one "
        "thread, batch 1. Accuracies are of the test split, which has 360 samples: one is 0.28 points. *accuracy* is "
        "the repacked model's; the last columns are what each source's plan, put on the target and fine-tuned alike, "
        "comes to. The plan is chosen on the validation split. A source whose plan another one had, too, has no figure."
    )
    return page("README's main job", "main_job", about, *parts)


def _cells(row: Job) -> list[str]:
    others = [f"{100 * row.others[x]:.2f}%" if x in row.others else MISSING for x in SOURCES]
    figures = [f"{row.seconds:.0f}", f"{row.speedup:.2f}x", f"{100 * row.dense:.2f}%", row.chosen]
    return [str(row.seed), *figures, f"{100 * row.accuracy:.2f}%", *others]


def _mean(rows: Sequence[Job]) -> list[str]:
    def percent(values: Iterable[float]) -> str:
        return mean_and_spread([100 * value for value in values])

    seconds, speedups = [row.seconds for row in rows], [row.speedup for row in rows]
    figures = [f"{statistics.fmean(seconds):.0f}", f"{statistics.fmean(speedups):.2f}x", percent(r.dense for r in rows)]
    others = [percent(row.others[x] for row in rows if x in row.others) for x in SOURCES]
    return ["mean", *figures, "", percent(row.accuracy for row in rows), *others]
