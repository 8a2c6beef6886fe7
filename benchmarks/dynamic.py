"""Gates against static plans: ``python -m benchmarks dynamic`` (two hours; it goes on where it was stopped).

Every row starts from one dense model and trains for as many epochs. Latency is of one image at a time on one thread,
call from Python included, over many test images, the models in turns. What is trained is kept in the user's cache
folder; nothing is chosen on the test split. Writes benchmarks/results/dynamic.md.

    python -m benchmarks dynamic --workers 2     # two runs at a time, a core each
    python -m benchmarks dynamic --report        # measure and report what is trained already; on an idle machine
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autoprune.report.console import Console
from benchmarks.dynamic_report import report
from benchmarks.dynamic_runs import Variant, is_trained, read, train_all
from benchmarks.dynamic_times import measure_runs, mechanism
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import write_page

STATIC = [Variant(sparsity) for sparsity in (0.0, 0.5, 0.75, 0.85, 0.9)]
DYNAMIC = [
    Variant(0.0, "inner", 0.5),
    Variant(0.0, "inner", 0.5, adaptive=False),
    Variant(0.0, "inner", 0.25),
    Variant(0.75, "inner", 0.5),
    Variant(0.75, "inner", 0.25),
    Variant(0.85, "inner", 0.5),
    Variant(0.75, "inner", 0.5, size=0),
    Variant(0.75, "both", 0.5),
    Variant(0.75, "late", 0.25),
]
VARIANTS = [*STATIC, *DYNAMIC]


def main(argv: Sequence[str]) -> int:
    parser = command_line("dynamic", __doc__)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is there")
    given = parser.parse_args(argv)
    if not given.report:
        train_all(VARIANTS, given.workers)
    torch.set_num_threads(1)
    runs = [read(variant) for variant in VARIANTS if is_trained(variant)]
    console = Console()
    write_page(given.output, "dynamic", report(measure_runs(runs, console), mechanism(console)))
    return 0
