"""What is asked for is delivered, or refused: ``python -m benchmarks ask [--models A,B] [--speedups 1.5,3]``.

`autoprune apply` is asked, in a process of its own, for speed-ups over the best dense engine, of five models unlike
those that the bundled policy learned from (``benchmarks/ask_models.py``). Shown of each: what was measured at the end,
and the score; or that it was refused, with what figure, and whether asking for that figure then holds. Rows are kept
in benchmarks/results/ask.jsonl, the page is benchmarks/results/ask.md. ``--busy`` keeps one core busy meanwhile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from benchmarks.ask_models import DATA
from benchmarks.lib.busy import busy_core
from benchmarks.lib.command_line import add_report, among, command_line, listed
from benchmarks.lib.page import page, write_page
from benchmarks.lib.sweep import Row, Rows, missing, sweep

SPEEDUPS = (1.5, 2.0, 3.0, 5.0)
CLOSE = 0.03  # below the target that counts as met: the noise of the final table
REFUSED = 2  # exit status


@dataclass(frozen=True)
class Asked(Row):
    """What came of one speed-up asked for.

    Attributes:
        outcome: ``met``, ``missed``, ``there without pruning`` or ``refused``.
        measured: speed-up over the best dense engine in the final table; of a refusal that of the figure it named,
            asked for again.
        drop: of the score, in its own units; positive is worse.
        offered: the figure of a refusal.
        seconds: of the command.
    """

    model: str
    speedup: float
    busy: bool
    outcome: str
    measured: float | None
    drop: float | None
    offered: float | None
    seconds: float

    @property
    def key(self) -> tuple[str, float, bool]:
        return self.model, self.speedup, self.busy

    @property
    def right(self) -> bool:
        """Whether what was asked for was delivered, or refused with a figure that holds."""
        asked = self.speedup if self.offered is None else self.offered
        return self.measured is not None and self.measured >= asked * (1 - CLOSE)


def main(argv: Sequence[str]) -> int:
    parser = command_line("ask", __doc__)
    parser.add_argument("--models", type=among(DATA), default=tuple(DATA), help=f"default {','.join(DATA)}")
    parser.add_argument("--speedups", type=listed(float), default=SPEEDUPS, help="default 1.5,2,3,5")
    parser.add_argument("--busy", action="store_true", help="another process keeps one core busy")
    add_report(parser)
    given = parser.parse_args(argv)
    rows = Rows(given.output / "ask.jsonl", Asked)
    points = [(model, speedup, given.busy) for model in given.models for speedup in given.speedups]
    failed = 0
    if not given.report:
        with busy_core(given.busy):
            failed = sweep(rows, missing(rows, points), _asked, Console(), note=_note)
    write_page(given.output, "ask", report(list(rows.last().values())))
    return 1 if failed else 0


def _note(row: Asked) -> str:
    return f"{row.outcome}, {row.measured or 0.0:.2f}x"


def _asked(point: tuple[str, float, bool]) -> Asked:
    model, speedup, busy = point
    started = time.perf_counter()
    status, said = ask(model, speedup)
    offered = None
    if status == REFUSED:
        found = re.search(r"Ask for at most ([\d.]+)x", said["error"])
        if found is None:
            raise RuntimeError(said["error"])
        offered = float(found[1])
        again, said = ask(model, offered) if offered > 1.0 else (REFUSED, {})
        if again == REFUSED:
            said = {}
    seconds = time.perf_counter() - started
    outcome = "refused" if offered is not None else _outcome(said, speedup)
    drop = said["dense_score"] - said["score"] if said else None
    return Asked(model, speedup, busy, outcome, said.get("speedup_over_best"), drop, offered, seconds)


def _outcome(said: dict[str, Any], speedup: float) -> str:
    if said["unpruned"] is not None:
        return "there without pruning"
    return "met" if said["speedup_over_best"] >= speedup * (1 - CLOSE) else "missed"


def ask(model: str, speedup: float) -> tuple[int, dict[str, Any]]:
    """The status of ``autoprune apply``, and its JSON object or error."""
    module = "benchmarks.ask_models"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "autoprune", "apply", "--quiet", "--json", "--run-dir", f"{folder}/run"),
            *("--model", f"{module}:{model}", "--data", f"{module}:{DATA[model]}", "--speedup", f"{speedup:g}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, REFUSED):
        raise RuntimeError(done.stderr[-2000:])
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr}


def report(rows: Sequence[Asked]) -> str:
    """The page: a table a state of the machine."""
    parts = []
    for busy in (False, True):
        if cells := [_cells(row) for row in rows if row.busy == busy]:
            right = sum(row.right for row in rows if row.busy == busy)
            parts.append("## While another process keeps one core busy" if busy else "## Without more load")
            parts.append(f"{right} of {len(cells)} were delivered, or refused with a figure that holds.")
            header = ("model", "asked for", "outcome", "measured", "score lost, points", "seconds")
            parts.append(markdown_table(header, cells, left=3))
    about = (
        "`autoprune apply --speedup` over the best dense float32 engine, batch 1, one thread; measured in the final "
        "table, all engines interleaved. A refusal names the most that is in reach; what is measured then is that "
        "figure, asked for again."
    )
    return page("Asked for a speed-up", "ask", about, *parts)


def _cells(row: Asked) -> list[str]:
    outcome = f"refused: at most {row.offered:g}x" if row.offered is not None else row.outcome
    measured = "-" if row.measured is None else f"{row.measured:.2f}x"
    lost = "-" if row.drop is None else f"{100 * row.drop:+.2f}"
    return [row.model, f"{row.speedup:g}x", outcome, measured, lost, f"{row.seconds:.0f}"]
