"""The rows of `python -m benchmarks front`, its page and its figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autoprune.report.plots import save_png
from autoprune.report.table import MISSING, markdown_table, mean_and_spread
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import Row
from benchmarks.methods_table import RECIPES, SETTINGS

DENSE = "dense"
PRECISIONS = ("float32", "int8")
Model = tuple[float, str, str]  # width, method, setting


@dataclass(frozen=True)
class Outcome(Row):
    """One network.

    Attributes:
        seed: of the network and its training.
        task: row of FRONTS.
        width: times the channels or units of the reference.
        method: row of RECIPES; DENSE for a dense network.
        setting: row of SETTINGS; empty for a dense network.
        validation, test: precision -> accuracy, in [0, 1]; in int8 that of the repacked form.
        macs: multiply-accumulates left, over those of the dense network as wide.
        seconds: processor time of its training.
        reference_ms: of the reference, in turns with this network.
        latency: what runs it -> its latency over the reference's, medians. Names that end in int8 or bf16 are of that
            precision.
    """

    seed: int
    task: str
    width: float
    method: str
    setting: str
    validation: Mapping[str, float]
    test: Mapping[str, float]
    macs: float
    seconds: float
    reference_ms: float
    latency: Mapping[str, float]

    @property
    def key(self) -> tuple[int, str, float, str, str]:
        return self.seed, self.task, self.width, self.method, self.setting

    @property
    def model(self) -> Model:
        return self.width, self.method, self.setting

    def fastest(self, precision: str) -> tuple[str, float]:
        """What runs it fastest in this precision, or in a wider one, and its latency over the reference's."""
        names = [name for name in self.latency if precision == "int8" or not name.endswith(("int8", "bf16"))]
        best = min(names, key=lambda name: self.latency[name])
        return best, self.latency[best]

    def __str__(self) -> str:
        name, latency = self.fastest("float32")
        return f"{100 * self.test['float32']:.2f}%, {latency:.3f} of the reference in {name}"


@dataclass(frozen=True)
class Mark:
    """A network in one precision: means over its seeds."""

    model: Model
    engine: str
    latency: float
    validation: float
    tests: Sequence[float]

    @property
    def test(self) -> float:
        return statistics.fmean(self.tests)


def report(rows: Sequence[tuple[Outcome, Provenance | None]], folder: Path) -> str:
    """The page; a figure for each task is written beside it."""
    latest = {row.key: (row, made) for row, made in rows}
    outcomes = [row for row, _ in latest.values()]
    parts = []
    for task in dict.fromkeys(row.task for row in outcomes):
        of_task = [row for row in outcomes if row.task == task]
        reference_ms = statistics.median(row.reference_ms for row in of_task)
        marks = {precision: _marks(of_task, precision) for precision in PRECISIONS}
        save_png(_figure(marks, reference_ms), folder / f"front_{task}.png")
        seeds = len({row.seed for row in of_task})
        parts += [
            f"## {task}, {seeds} seed{'s' * (seeds > 1)}",
            f"The reference takes {reference_ms:.3f} ms, in the median of all rows.",
            f"![Accuracy and latency](front_{task}.png)",
            *(_compared(marks[precision], precision) for precision in PRECISIONS),
            "### All networks",
            _table(of_task, marks),
        ]
    return page(
        "Large and pruned, or small and dense",
        "front",
        "Networks of one architecture, trained for the same number of epochs: dense ones in several widths, and pruned "
        "ones. Latencies are of one sample on one thread, as shares of a reference's that is timed in turns with each: "
        "the dense network of width 1 in ONNX Runtime, in float32. A dense network counts in its fastest engine, ours "
        "among them, a pruned one repacked. Accuracies are of the test split, means over the seeds; which pruned "
        "network stands against a dense one is chosen on the validation split. In int8 the accuracy of a dense network "
        "is that of its repacked form, after calibration, whatever engine is fastest.",
        *parts,
        Machines(made for _, made in latest.values()).legend(),
    )


def _marks(outcomes: Sequence[Outcome], precision: str) -> list[Mark]:
    """Of all networks, the fastest first."""
    marks = []
    for model in dict.fromkeys(row.model for row in outcomes):
        found = [row for row in outcomes if row.model == model]
        # an int8 network that float32 engines run faster is still the int8 one: its accuracy is counted
        best = [row.fastest(precision) for row in found]
        marks.append(
            Mark(
                model,
                statistics.mode(name for name, _ in best),
                statistics.median(latency for _, latency in best),
                statistics.fmean(row.validation[precision] for row in found),
                [100 * row.test[precision] for row in found],
            )
        )
    return sorted(marks, key=lambda mark: mark.latency)


def _compared(marks: Sequence[Mark], precision: str) -> str:
    """Each dense network against the pruned one that is best on the validation split among those as fast."""
    header = ("dense network", "latency", "in", "test accuracy", "pruned network", "latency", "test accuracy", "points")
    lines = []
    for dense in marks:
        if dense.model[1] != DENSE:
            continue
        fast = [mark for mark in marks if mark.model[1] != DENSE and mark.latency <= dense.latency]
        cells = [_name(dense.model), f"{dense.latency:.3f}", dense.engine, mean_and_spread(dense.tests)]
        if fast:
            best = max(fast, key=lambda mark: mark.validation)
            gain = f"{best.test - dense.test:+.2f}"
            lines.append([*cells, _name(best.model), f"{best.latency:.3f}", mean_and_spread(best.tests), gain])
        else:
            lines.append([*cells, *[MISSING] * 4])
    return f"### At the latency of a dense network, {precision}\n\n{markdown_table(header, lines, left=1)}"


def _table(outcomes: Sequence[Outcome], marks: Mapping[str, Sequence[Mark]]) -> str:
    header = ("network", "seeds", "MACs left", *(f"{each}: {what}" for each in PRECISIONS for what in (
        "test accuracy", "latency", "in")), "training s")  # fmt: skip
    by_model = {precision: {mark.model: mark for mark in marks[precision]} for precision in PRECISIONS}
    lines = []
    for model in by_model["float32"]:
        found = [row for row in outcomes if row.model == model]
        cells = [_name(model), str(len(found)), f"{100 * statistics.fmean(row.macs for row in found):.1f}%"]
        for precision in PRECISIONS:
            mark = by_model[precision][model]
            cells += [mean_and_spread(mark.tests), f"{mark.latency:.3f}", mark.engine]
        lines.append([*cells, f"{statistics.fmean(row.seconds for row in found):.0f}"])
    return markdown_table(header, lines, left=1)


def _name(model: Model) -> str:
    width, method, setting = model
    if method == DENSE:
        return f"{width:g}x"
    return f"{width:g}x, {SETTINGS[setting].sparsity:.0%} cut, {RECIPES[method].what}"


def _figure(marks: Mapping[str, Sequence[Mark]], reference_ms: float) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(PRECISIONS), sharey=True)
    for axis, precision in zip(panels, PRECISIONS, strict=True):
        _panel(axis, marks[precision], reference_ms)
        axis.set(title=precision, xlabel="latency, ms", xscale="log")
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend()
    return figure


def _panel(axis: Axes, marks: Sequence[Mark], reference_ms: float) -> None:
    """Dense networks joined by a line, pruned ones in a colour a method; bars are one standard deviation."""
    methods = sorted({mark.model[1] for mark in marks}, key=lambda name: (name != DENSE, name))
    for at, method in enumerate(methods):
        shown = [mark for mark in marks if mark.model[1] == method]
        axis.errorbar(
            [mark.latency * reference_ms for mark in shown],
            [mark.test for mark in shown],
            yerr=[statistics.stdev(mark.tests) if len(mark.tests) > 1 else 0.0 for mark in shown],
            fmt="s-" if method == DENSE else "o",
            color="k" if method == DENSE else f"C{at - 1}",
            markersize=4,
            label=DENSE if method == DENSE else RECIPES[method].what,
        )
    axis.grid(alpha=0.3)
