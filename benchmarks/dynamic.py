"""Gates against static plans: ``python benchmarks/dynamic.py`` (two hours; it goes on where it was stopped).

Every row starts from one dense model and trains for as many epochs. Latency is of one image at a time on one thread,
call from Python included, over many test images, the models in turns. What is trained is kept in the user's cache
folder; nothing is chosen on the test split. Writes benchmarks/results/dynamic.md.

    python benchmarks/dynamic.py --workers 2     # two runs at a time, a core each
    python benchmarks/dynamic.py --report        # measure and report what is trained already; on an idle machine
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dynamic_report import report
from dynamic_runs import Variant, is_trained, read, train_all
from dynamic_times import measure_runs, mechanism

from autoprune.files import write_text
from autoprune.report.console import Console

RESULTS = Path(__file__).parent / "results" / "dynamic.md"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is there")
    given = parser.parse_args()
    if not given.report:
        train_all(VARIANTS, given.workers)
    torch.set_num_threads(1)
    runs = [read(variant) for variant in VARIANTS if is_trained(variant)]
    console = Console()
    text = report(measure_runs(runs, console), mechanism(console))
    write_text(RESULTS, text)
    print(text)


if __name__ == "__main__":
    main()
