"""What `python -m benchmarks engine` keeps and shows: a row a cell, the table, the plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from autoprune.files import write_text
from autoprune.latency.engines import ENGINES, baselines
from autoprune.repack.tuning.layer_times import LayerTime
from autoprune.report.plots import save_png
from autoprune.report.table import MISSING, markdown_table
from benchmarks.lib.isa import ALL, HELD
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Provenance
from benchmarks.lib.sweep import Row as SweepRow
from benchmarks.lib.sweep import Rows

REPACKED = "repacked"
NOT_SLOWER = 0.97  # below this a cell is slower than dense, not noise
# Speed-ups that the project set out for, in float32 over the best dense engine of float32, in other precisions over the
# best of any: precision -> model -> sparsity -> at batch 1, G=8.
GOALS: Mapping[str, Mapping[str, Mapping[float, float]]] = {
    "float32": {
        "resnet18": {0.0: 0.9, 0.5: 1.7, 0.75: 3.0, 0.9: 5.0},
        "resnet50": {0.5: 1.6, 0.75: 2.6, 0.9: 4.0},
        "mobilenet_v2": {0.5: 1.3, 0.75: 1.8, 0.9: 2.5},
        "vit_small": {0.5: 1.4, 0.75: 2.0, 0.9: 2.8},
        "bert_mini": {0.5: 1.4, 0.75: 2.0, 0.9: 2.8},
    },
    "int8": {"resnet18": {0.5: 1.7, 0.75: 2.8, 0.9: 4.2}},
}
GOAL_GROUP = 8
ABOUT = """\
Random weights, milliseconds an inference; all engines and the
repacked model of a row were timed in turns in one run. The best dense engine of float32 is in bold. **Speed-up: over
that engine**, the median over the rounds (p10-p90); beside it that over the best dense engine of any precision. Where
a time is not of float32, dB tell how close the outputs are to torch eager's: the dense model's for engines, the masked
one's for the repacked model. Engines in int8 and the repacked model in int8 are calibrated with the same four batches,
none of which is the timed one.

Pruned by magnitude in groups of G filters, each layer to the same sparsity: every convolution but the first and the
depthwise ones (so the 1x1 convolutions of MobileNetV2), every Linear but the classifier. A block is how many
neighbouring inputs are kept or cut together. Dense engines run the model
before pruning: zeros do not change their speed. So one that took 1.4 times as long as the best in the first cell of a
model, batch and number of threads was not timed in the others.
"""


@dataclass(frozen=True, order=True)
class Cell:
    """What is measured at a time."""

    model: str
    sparsity: float
    group: int
    batch: int
    threads: int
    precision: str = "float32"
    block: int = 1
    isa: str = ALL

    def __str__(self) -> str:
        text = f"{self.model} {self.sparsity:.0%} G={self.group} batch {self.batch} threads {self.threads}"
        usual = {"float32", "block 1", ALL}
        return " ".join([text, *(x for x in (self.precision, f"block {self.block}", self.isa) if x not in usual)])

    @property
    def engines(self) -> tuple[Any, ...]:
        """What its dense engines depend on."""
        return (self.model, self.batch, self.threads, self.isa)


@dataclass(frozen=True)
class Spread:
    """Median and tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Row(SweepRow):
    """One measured cell.

    Attributes:
        times_ms: of the dense engines and of the repacked model.
        deepsparse_ms: of DeepSparse on the same zeros, in a process of its own right after the others.
        left_out: engine -> why it is missing.
        best: the fastest dense float32 engine.
        speedup: median over the rounds of the best engine's time by the repacked model's.
        relative_error: largest difference to the masked model's outputs by the largest of these.
        repack_s: seconds that `autoprune.repack` took.
        load: the machine's load average before.
        commit: the revision measured.
        best_any: the fastest dense engine of any precision; empty in rows from before there were others.
        speedup_any: like `speedup`, over that engine.
        snr_db: engine or repacked model -> signal-to-noise ratio of its outputs against torch eager's, where finite.
        notes: engine -> what it decided.
    """

    cell: Cell
    times_ms: dict[str, Spread]
    deepsparse_ms: Spread | None
    left_out: dict[str, str]
    best: str
    speedup: float
    speedup_spread: Spread
    relative_error: float
    repack_s: float
    rounds: int
    load: float
    commit: str
    best_any: str = ""
    speedup_any: float | None = None
    snr_db: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Cell:
        return self.cell

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        sparse = data["deepsparse_ms"]
        read = {
            "cell": Cell(**data["cell"]),
            "times_ms": {name: Spread(**value) for name, value in data["times_ms"].items()},
            "deepsparse_ms": sparse and Spread(**sparse),
            "speedup_spread": Spread(**data["speedup_spread"]),
        }
        return cls(**{**data, **read})


def spread(values: Sequence[float]) -> Spread:
    """Percentiles as the timer takes them."""
    ordered, last = sorted(values), len(values) - 1
    return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def results_file(folder: Path, key: str) -> Rows[Row]:
    """The cells measured on one machine.

    Args:
        folder: of all results.
        key: of `machine_key`.
    """
    return Rows(folder / "engine" / f"{key}.jsonl", Row)


def report(folder: Path, key: str) -> str:
    """Writes engine.md and the plots from the rows of one machine; returns the text."""
    kept = results_file(folder, key)
    rows = sorted(kept.last().values(), key=lambda row: _order(row.cell))
    if not rows:
        return f"nothing is measured yet in {kept.path}"
    parts = [f"{Provenance.here().machine_text}."]
    for isa, precision in sorted({(row.cell.isa, row.cell.precision) for row in rows}, key=_section):
        inside = [row for row in rows if (row.cell.isa, row.cell.precision) == (isa, precision)]
        parts.append(f"## The repacked model in {precision}, engines {HELD[isa]}")
        parts += [goals_table(inside, precision), slowest(inside), table(inside), notes(inside)]
    drawn = [row for row in rows if (row.cell.isa, row.cell.precision, row.cell.block) == (ALL, "float32", 1)]
    for model in dict.fromkeys(row.cell.model for row in drawn):
        save_png(figure([row for row in drawn if row.cell.model == model]), folder / f"engine_{model}.png")
        parts.append(f"![{model}](engine_{model}.png)")
    text = page("Repacked models against dense engines", "engine", ABOUT, *parts)
    write_text(folder / "engine.md", text)
    return text


def _order(cell: Cell) -> tuple[Any, ...]:
    return (cell.batch, cell.threads, cell.model, cell.sparsity, cell.group, cell.block)


def _section(which: tuple[str, str]) -> tuple[bool, str, bool, str]:
    isa, precision = which
    return (isa != ALL, isa, precision != "float32", precision)  # what is usual first


def goals_table(rows: Sequence[Row], precision: str) -> str:
    """Speed-ups at batch 1 and G=8, of the best block, and in brackets what the project set out for.

    Args:
        rows: of one precision.
        precision: float32 is compared with float32, others with the best dense engine of any precision.
    """
    sparsities = sorted({row.cell.sparsity for row in rows})
    found: dict[tuple[Any, ...], float] = {}
    for row in rows:
        value = row.speedup if precision == "float32" else row.speedup_any
        if value is not None and row.cell.batch == 1:
            place = (row.cell.model, row.cell.sparsity, row.cell.group, row.cell.threads)
            found[place] = max(value, found.get(place, value))
    lines = []
    for model, threads in sorted({(row.cell.model, row.cell.threads) for row in rows if row.cell.batch == 1}):
        line = [model, str(threads)]
        for sparsity in sparsities:
            group = GOAL_GROUP if sparsity > 0 else 1
            value = found.get((model, sparsity, group, threads))
            goal = GOALS.get(precision, {}).get(model, {}).get(sparsity)
            asked = f" ({goal:.1f}x)" if goal is not None else ""
            line.append(MISSING if value is None else f"{value:.2f}x{asked}")
        lines.append(line)
    over = "the best dense engine" + ("" if precision == "float32" else " of any precision")
    header = (f"batch 1, G=8: speed-up over {over} (goal)", "threads", *(f"{sparsity:.0%}" for sparsity in sparsities))
    return markdown_table(header, lines)


def slowest(rows: Sequence[Row]) -> str:
    """The lowest speed-up, and every cell that is slower than dense."""
    lowest = min(rows, key=lambda row: row.speedup)
    below = [f"- {row.cell}: {row.speedup:.2f}x" for row in rows if row.speedup < NOT_SLOWER]
    head = f"{len(rows)} cells; the lowest speed-up is {lowest.speedup:.2f}x ({lowest.cell}). "
    return "\n".join([head + f"Below {NOT_SLOWER}x: {len(below)}.", "", *below, ""])


def table(rows: Sequence[Row]) -> str:
    """A row a cell."""
    engines = [name for name in ENGINES if any(name in row.times_ms for row in rows)]
    titles = [name if name in baselines() else f"{name} (not float32)" for name in engines]
    sparse = ["deepsparse (own process)"] if any(row.deepsparse_ms for row in rows) else []
    lines = []
    for row in rows:
        cell = row.cell
        line = [cell.model, f"{cell.sparsity:.0%}"]
        line += [str(cell.group), str(cell.block)] if cell.sparsity else [MISSING, MISSING]
        line += [str(cell.batch), str(cell.threads)]
        line += [_ms(row.times_ms.get(name), _heard(row, name), bold=name == row.best) for name in engines]
        line += [_ms(row.deepsparse_ms)] if sparse else []
        line += [_ms(row.times_ms[REPACKED], _heard(row, REPACKED))]
        line += [f"{row.speedup:.2f}x ({row.speedup_spread.p10:.2f}-{row.speedup_spread.p90:.2f})"]
        line += [MISSING if row.speedup_any is None else f"{row.speedup_any:.2f}x ({row.best_any})"]
        line += [f"{row.relative_error:.0e}", f"{row.repack_s:.1f}", f"{row.load:.1f}", row.commit]
        lines.append(line)
    header = ("model", "sparsity", "G", "block", "batch", "threads", *titles, *sparse, REPACKED, "speed-up")
    return markdown_table(
        (*header, "over the best dense engine of any precision", "error", "repack s", "load", "revision"), lines
    )


def notes(rows: Sequence[Row]) -> str:
    """What engines decided, a line for each model and decision."""
    found = {(row.cell.model, name, note) for row in rows for name, note in row.notes.items()}
    return "\n".join(f"- {name}, {model}: {note}" for model, name, note in sorted(found))


def _heard(row: Row, name: str) -> float | None:
    """Its signal-to-noise ratio, where it is not of float32."""
    exact = row.cell.precision == "float32" if name == REPACKED else name in baselines()
    return None if exact else row.snr_db.get(name)


def _ms(value: Spread | None, snr_db: float | None = None, bold: bool = False) -> str:
    if value is None:
        return MISSING
    text = f"{value.median:.2f}"
    if snr_db is not None:
        text += f" ({snr_db:.0f} dB)"
    return f"**{text}**" if bold else text


def figure(rows: Sequence[Row]) -> Figure:
    """Speed-up over the best dense engine against sparsity, a line a G; a panel a batch and number of threads."""
    panels = sorted({(row.cell.batch, row.cell.threads) for row in rows})
    made = Figure(figsize=(1.2 + 4.0 * len(panels), 4.2), dpi=120, layout="constrained")
    made.suptitle(f"{rows[0].cell.model}: repacked over the best dense engine")
    for axes, panel in zip(made.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        inside = [row for row in rows if (row.cell.batch, row.cell.threads) == panel]
        dense = [row for row in inside if row.cell.sparsity == 0]
        for group in sorted({row.cell.group for row in inside if row.cell.sparsity > 0}):
            line = dense + [row for row in inside if row.cell.sparsity > 0 and row.cell.group == group]
            places = [100 * row.cell.sparsity for row in line]
            axes.plot(places, [row.speedup for row in line], marker="o", label=f"G={group}")
        axes.axhline(1.0, color="k", linewidth=0.8, linestyle="--")
        axes.set(xlabel="sparsity (%)", ylabel="speed-up", title=f"batch {panel[0]}, {panel[1]} thread(s)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    return made


def roofline(rows: Sequence[LayerTime], title: str, peak_gflops: float, bandwidths_gbs: Mapping[str, float]) -> Figure:
    """Useful GFLOP/s against FLOP a byte, a mark an operation that multiplies and adds, under the measured roofs.

    Args:
        rows: operations of one program.
        title: what was measured.
        peak_gflops: fused multiply-adds of one core.
        bandwidths_gbs: what is read from -> GB/s of one core.
    """
    shown = [row for row in rows if row.flops]
    made = Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    axes = made.add_subplot(xscale="log", yscale="log", xlabel="useful FLOP/byte", ylabel="useful GFLOP/s", title=title)
    lowest, highest = min(row.intensity for row in shown) / 2, max(row.intensity for row in shown) * 2
    right = max(highest, *(peak_gflops / speed for speed in bandwidths_gbs.values()))
    for style, (name, speed) in zip(("--", ":", "-."), bandwidths_gbs.items(), strict=False):
        places = [lowest, peak_gflops / speed, right]
        roof = [min(peak_gflops, speed * place) for place in places]
        axes.plot(places, roof, color="k", linestyle=style, linewidth=1, label=f"{name}, {speed:.0f} GB/s")
    axes.axhline(peak_gflops, color="k", linewidth=1, label=f"FMA peak, {peak_gflops:.0f} GFLOP/s")
    for at, kind in enumerate(dict.fromkeys(row.kind for row in shown)):
        marks = [row for row in shown if row.kind == kind]
        places, rates = [row.intensity for row in marks], [row.gflops for row in marks]
        axes.scatter(places, rates, s=22, color=f"C{at}", label=kind, zorder=3)
    for row in shown:
        axes.annotate(row.name, (row.intensity, row.gflops), (3, 3), textcoords="offset points", fontsize=5)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return made


def save_roofline(figure: Figure, folder: Path) -> Path:
    """Where it was written."""
    path = folder / "engine_roofline.png"
    save_png(figure, path)
    return path
