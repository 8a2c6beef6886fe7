"""Any model in, a faster model out: ``python -m benchmarks coverage [--forms] [--family tv] [--models tv:resnet18]``.

Other people's models (``benchmarks/coverage_models``), with random weights, are pruned by 75% in groups of 8 filters
(4, 2, 1 where 8 does not divide) and repacked as their users call them. Shown of each: whether it became one program,
and why not; what torch still runs in it; how much faster it is than torch, and than the best dense engine, in one
run, batch 1, one thread; whether it computes the same, also when loaded from a file, with another batch and at another
size. Each model has two processes of its own, so that a crash is a row, too. Rows are kept in
benchmarks/results/coverage.jsonl, the page is benchmarks/results/coverage.md. With ``--forms`` nothing is tuned or
timed, which takes seconds a model and no quiet machine: what is left is what does not depend on a clock, in
coverage_forms.jsonl and coverage_forms.md beside them. Needs
``pip install -c constraints.txt -e ".[engines,coverage-models]"``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autoprune.files import read_json
from autoprune.latency.engines import baselines
from autoprune.report.console import Console
from benchmarks.coverage_models import EXTRA, FAMILIES, MODELS
from benchmarks.coverage_report import Covered, forms, report
from benchmarks.lib.command_line import add_report, among, command_line
from benchmarks.lib.page import write_page
from benchmarks.lib.sweep import Rows, missing, sweep

ENGINES = tuple(name for name in baselines() if name != "eager")  # torch as it is is there anyway
SECONDS = 6.0  # of timing a model
PATIENCE_S = 900.0  # of all that is done with a model
STAGES = ("pack", "judge")
UNTIMED = ("form",)


def main(argv: Sequence[str]) -> int:
    parser = command_line("coverage", __doc__)
    parser.add_argument("--models", type=among(MODELS), help="e.g. tv:resnet18,hf:bert; default all")
    parser.add_argument("--family", type=among(FAMILIES), default=tuple(FAMILIES), help=f"of {','.join(FAMILIES)}")
    parser.add_argument("--engines", type=among(ENGINES), default=ENGINES, help=f"default {','.join(ENGINES)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing a model; default 6")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds, of a model; default 900")
    parser.add_argument("--forms", action="store_true", help="tune and time nothing: a page of its own")
    parser.add_argument("--redo", action="store_true", help="measure these models again")
    add_report(parser)
    given = parser.parse_args(argv)
    kept, page, stages = ("coverage_forms", forms, UNTIMED) if given.forms else ("coverage", report, STAGES)
    rows = Rows(given.output / f"{kept}.jsonl", Covered)
    wanted = given.models or [f"{family}:{name}" for family in given.family for name in FAMILIES[family]]
    measure = partial(
        covered, engines=given.engines, seconds=given.seconds, patience_s=given.patience, stages=stages
    )  # fmt: skip
    failed = 0
    if not given.report:
        failed = sweep(rows, missing(rows, wanted, given.redo), measure, Console(), note=Covered.__str__)
    write_page(given.output, kept, page(rows.read()))
    return 1 if failed else 0


def covered(
    model: str, engines: Sequence[str], seconds: float, patience_s: float, stages: Sequence[str] = STAGES
) -> Covered:  # fmt: skip
    """The row of a model.

    Args:
        model: of MODELS.
        engines: dense ones, besides torch as it is.
        seconds: of timing.
        patience_s: seconds of all that is done with it.
        stages: of `benchmarks.coverage_work`, each a process.

    Raises:
        RuntimeError: its package is not installed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
        place = Path(folder) / "found.json"
        cache = {"AUTOPRUNE_CACHE": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
        for stage in stages:
            command = [sys.executable, "-m", "benchmarks.coverage_work", stage, model, str(place)]
            left_s = patience_s - (time.perf_counter() - start)
            ended = outcome([*command, ",".join(engines), str(seconds)], {**os.environ, **cache}, left_s)
            found: dict[str, Any] = read_json(place, "what was found") if place.exists() else {}
            if found.get("failure", "").startswith("MissingExtra"):
                raise RuntimeError(f'not installed: pip install "autoprune[{EXTRA}]".')
            if ended:
                found.setdefault("failure", ended)
                break
    return Covered(model, seconds=time.perf_counter() - start, **found)


def outcome(command: Sequence[str], environment: dict[str, str], patience_s: float) -> str:
    """Runs a process and those it starts to their end; empty where it went well, else what became of it."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=max(1.0, patience_s))
    except subprocess.TimeoutExpired:
        return f"not done after {patience_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    return (said.strip().splitlines() or ["no word"])[-1] if process.returncode else ""
