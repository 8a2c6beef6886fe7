"""The README's picture: speed-ups over the fastest dense engine by sparsity, from the rows that `engine` has kept.

    python -m benchmarks speedup_picture

Batch 1, one thread, of the machine whose rows the README's table shows. Draws benchmarks/results/speedup.svg.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from autoprune.files import write_text
from benchmarks.engine_report import Cell, Row, results_file
from benchmarks.lib.command_line import command_line

MACHINE = "amd-epyc-2-e9b0fcca"
MODELS = {  # name -> label, filters in a group: the rows of the README's table
    "resnet20": ("ResNet-20", 8),
    "resnet50": ("ResNet-50", 8),
    "resnet18": ("ResNet-18", 8),
    "bert_mini": ("BERT-mini", 16),
    "vit_small": ("ViT-small", 16),
    "mobilenet_v2": ("MobileNetV2", 8),
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "autoprune",
    "svg.fonttype": "none",
    "font.size": 11,
}  # the same bytes every time


def line_of(rows: Iterable[Row], model: str, group: int) -> list[Row]:
    """The rows of a model by sparsity; a dense model has no groups."""
    found = [row for row in rows if row.cell == Cell(model, row.cell.sparsity, group if row.cell.sparsity else 1, 1, 1)]
    return sorted(found, key=lambda row: row.cell.sparsity)


def picture(rows: Sequence[Row]) -> Figure:
    """One line a model; the fastest dense engine is the dashed line at 1."""
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for model, (label, group) in MODELS.items():
        line = line_of(rows, model, group)
        axes.plot([100 * row.cell.sparsity for row in line], [row.speedup for row in line], marker="o", label=label)
    axes.axhline(1.0, color="k", linewidth=0.9, linestyle="--", label="fastest dense engine")
    axes.set(xlabel="weights cut, in groups (%)", ylabel="times as fast as the fastest dense engine", ylim=(0, None))
    axes.set_title("Pruned and repacked models, one CPU core, batch 1")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str]) -> int:
    given = command_line("speedup_picture", __doc__).parse_args(argv)
    rows = [*results_file(given.output, MACHINE).last().values()]
    with matplotlib.rc_context(STYLE):
        text = io.StringIO()
        picture(rows).savefig(text, format="svg", metadata={"Date": None})
    write_text(given.output / "speedup.svg", "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
    return 0
