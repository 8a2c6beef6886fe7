"""Packed LSTMs and GRUs against the best dense engine of the same run.

    python -m benchmarks recurrent             # everything: about an hour
    python -m benchmarks recurrent --quick     # LSTM, hidden 256, batch 1: about two minutes
    python -m benchmarks recurrent --report    # measures nothing, draws what there is

One layer with as many features as hidden units, random weights, float32, one thread; a sequence of 50 steps, and a
single step that takes and gives its states. Pruned by magnitude in groups of 16 rows (four LSTM units with their four
gates); at 90% also with states cut by a threshold, at the one that leaves 20% and 10% of them. A case is one cell,
hidden size, batch and length: every dense engine and every packed variant timed in turns. Cases are kept in
benchmarks/results/recurrent/ as they are measured, a file a machine, so a run that was stopped goes on. Writes
benchmarks/results/recurrent.md and a plot.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.latency.engines import ENGINES
from autoprune.latency.machine import machine_text
from autoprune.latency.timer import Protocol, measure_together, speedup
from autoprune.model.inventory import take_inventory
from autoprune.model.recurrent.modules import cut_states_
from autoprune.progress import Progress
from autoprune.registry import Choice
from autoprune.repack import ProgramModel
from autoprune.report.console import Console
from autoprune.report.plots import save_png
from autoprune.report.table import MISSING, markdown_table
from benchmarks.engine_report import Spread, spread
from benchmarks.lib.command_line import add_report, among, command_line, listed
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import machine_key
from benchmarks.lib.pruning import pruned
from benchmarks.lib.sweep import Row as SweepRow
from benchmarks.lib.sweep import Rows, missing, sweep

GROUP = 16
STEPS = 50
HIDDEN, BATCHES = (256, 512, 1024), (1, 8)
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)
CUT_AT = 0.9  # the sparsity at which states are cut too
KEPT = (0.2, 0.1)  # of the states
DENSE = ("eager", "onnxruntime", "openvino")  # torch.compile leaves a recurrent layer to eager's operator
PROTOCOL = Protocol(samples=15, warmup=3, threads=1, min_sample_ms=2.0, lead=1)
WRONG = 1e-3
CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True, order=True)
class Case:
    """What is timed in one run; `steps` 1: a single step with its states."""

    cell: str
    hidden: int
    batch: int
    steps: int

    def __str__(self) -> str:
        what = "a step" if self.steps == 1 else f"{self.steps} steps"
        return f"{self.cell.upper()} {self.hidden}, batch {self.batch}, {what}"


@dataclass(frozen=True, order=True)
class Variant:
    """A packed form: zeros in the weights, and the share of its states that is left (1: all)."""

    sparsity: float
    kept: float = 1.0

    def __str__(self) -> str:
        return f"{self.sparsity:.0%}" + ("" if self.kept == 1.0 else f", {self.kept:.0%} of the states")


@dataclass(frozen=True)
class Row(SweepRow):
    """One measured case.

    Attributes:
        dense_ms: of each dense engine.
        packed: a variant's time, its speed-up over the best dense engine, and the share of its states that were live.
        left_out: engine -> why it is missing.
    """

    case: Case
    dense_ms: dict[str, Spread]
    best: str
    packed: dict[Variant, tuple[Spread, Spread, float]]
    left_out: dict[str, str]
    load: float

    @property
    def key(self) -> Case:
        return self.case

    def to_json(self) -> dict[str, Any]:
        packed = [[asdict(key), asdict(time), asdict(gain), live] for key, (time, gain, live) in self.packed.items()]
        return {**vars(self), "case": asdict(self.case), "packed": packed,
                "dense_ms": {name: asdict(value) for name, value in self.dense_ms.items()}}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        packed = {Variant(**key): (Spread(**time), Spread(**gain), live) for key, time, gain, live in data["packed"]}
        dense = {name: Spread(**value) for name, value in data["dense_ms"].items()}
        return cls(**{**data, "case": Case(**data["case"]), "packed": packed, "dense_ms": dense})


class Sequence_(nn.Module):
    """States of a whole sequence."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


class LstmStep(nn.Module):
    """A step with its states."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.rnn(x, (h, c))
        return y, h, c


class GruStep(nn.Module):
    """Likewise."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, h)
        return y, h


def cut(model: nn.Module, x: Tensor, kept: float) -> nn.Module:
    """The model with its states cut by the threshold that leaves about `kept` of them on `x`."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        share = live(cut_states_(model, threshold=middle), x)
        low, high = (middle, high) if share > kept else (low, middle)
    return cut_states_(model, threshold=high)


@torch.inference_mode()
def live(model: nn.Module, x: Tensor) -> float:
    """The share of states that are not zero."""
    return float((model(x) != 0).float().mean())


def measure(case: Case, variants: Sequence[Variant], progress: Progress) -> Row:
    """One case.

    Raises:
        AutopruneError: a variant cannot be repacked, or not to the same outputs.
    """
    torch.manual_seed(0)
    rnn = CELLS[case.cell](case.hidden, case.hidden).eval()
    x = torch.randn(STEPS, case.batch, case.hidden)
    whole = Sequence_(rnn)
    layers = take_inventory(whole, x).layers
    forms: dict[Variant, tuple[nn.Module, tuple[Tensor, ...], float]] = {}
    for variant in variants:
        masked: nn.Module = pruned(whole, layers, Choice("group", {"size": GROUP}), variant.sparsity)
        if variant.kept < 1.0:
            masked = cut(masked, x, variant.kept)
        forms[variant] = (*called(masked, case, x), live(masked, x))
    dense, inputs = called(whole, case, x)
    calls: dict[Any, Callable[[], object]] = {}
    left_out = {}
    for name in DENSE:
        try:
            calls[name] = ENGINES.create(Choice(name)).prepare(dense, inputs, PROTOCOL.threads)
        except AutopruneError as error:
            left_out[name] = str(error)
    for variant, (masked, given, _) in forms.items():
        fast = autoprune.repack(masked, given, threads=PROTOCOL.threads, form="program")
        if variant.kept == 1.0:  # of a state on the threshold either result may be right; repack compares without cuts
            check(fast, masked, given, f"{case}: {variant}")
        assert isinstance(fast, ProgramModel)
        calls[variant] = fast.bind(*given)
        progress.say(f"{case}: {variant} repacked")
    load = os.getloadavg()[0]
    times = measure_together(calls, PROTOCOL)
    engines = {name: taken for name, taken in times.items() if isinstance(name, str)}
    best = min((name for name in engines), key=lambda name: engines[name].median_ms)
    packed = {}
    for variant, (_, _, share) in forms.items():
        taken = times[variant]  # type: ignore[index]
        ratios = [slow / fast for slow, fast in zip(engines[best].samples_ms, taken.samples_ms, strict=True)]
        gain = spread(ratios)
        assert abs(gain.median - speedup(engines[best], taken)) < 1e-9
        packed[variant] = (spread(taken.samples_ms), gain, share)
    return Row(case, {name: spread(taken.samples_ms) for name, taken in engines.items()}, best, packed, left_out, load)


def called(model: nn.Module, case: Case, x: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module to time and its inputs: the sequence, or a step in the middle of it with the states before."""
    if case.steps > 1:
        return model, (x,)
    rnn: Any = model.rnn
    with torch.inference_mode():
        _, states = rnn(x[: STEPS // 2])
    if case.cell == "lstm":
        return LstmStep(rnn), (x[STEPS // 2 :][:1].clone(), *(each.clone() for each in states))
    return GruStep(rnn), (x[STEPS // 2 :][:1].clone(), states.clone())


def check(fast: nn.Module, masked: nn.Module, given: tuple[Tensor, ...], what: str) -> None:
    with torch.inference_mode():
        got, wanted = fast(*given), masked(*given)
    pairs = [(got, wanted)] if isinstance(got, Tensor) else zip(got, wanted, strict=True)
    for one, other in pairs:
        error = float((one - other).abs().max() / other.abs().max())
        if not error <= WRONG:
            raise AutopruneError(f"{what}: the outputs are {error:.1e} off (relative).")


# Results -------------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    """The page, from the rows."""
    about = [
        "As many features as hidden units, one layer, random weights, float32, one thread; all forms of a row timed",
        "in turns, bound to their inputs and (but for eager) outputs. **Speed-up: over the best dense engine of the",
        "row** (in bold), median over the rounds (p10-p90).",
        f'Groups of {GROUP} rows. "of the states": they are cut by a threshold too, and that share was left.',
    ]  # fmt: skip
    variants = sorted({variant for row in rows for variant in row.packed}, key=lambda each: (each.sparsity, -each.kept))
    engines = list(dict.fromkeys(name for row in rows for name in row.dense_ms))
    header = ("case", *(f"{name} ms" for name in engines), *(str(each) for each in variants))
    cells = []
    for row in rows:
        dense = [_dense(row, name) for name in engines]
        cells.append((str(row.case), *dense, *(_gain(row, each) for each in variants)))
    packed = [(str(row.case), *(_packed(row, each) for each in variants)) for row in rows]
    return page(
        "Packed LSTMs and GRUs against dense engines",
        "recurrent",
        f"Timed on {machine_text()}.",
        "\n".join(about),
        markdown_table(header, cells),
        "Milliseconds of the packed forms:",
        markdown_table(("case", *map(str, variants)), packed),
    )


def _dense(row: Row, name: str) -> str:
    if name not in row.dense_ms:
        return MISSING
    text = f"{row.dense_ms[name].median:.3f}"
    return f"**{text}**" if name == row.best else text


def _packed(row: Row, variant: Variant) -> str:
    return f"{row.packed[variant][0].median:.3f}" if variant in row.packed else MISSING


def _gain(row: Row, variant: Variant) -> str:
    if variant not in row.packed:
        return MISSING
    _, gain, _ = row.packed[variant]
    return f"{gain.median:.2f}x ({gain.p10:.2f}-{gain.p90:.2f})"


def draw(rows: Sequence[Row]) -> Figure:
    """Speed-up against sparsity, a line a case."""
    figure = Figure(figsize=(9, 5))
    for axes, steps in zip(figure.subplots(1, 2, sharey=True), (STEPS, 1), strict=True):
        for row in (row for row in rows if row.case.steps == steps):
            points = sorted(
                (each.sparsity, gain.median) for each, (_, gain, _) in row.packed.items() if each.kept == 1.0
            )
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                label=f"{row.case.cell} {row.case.hidden}, batch {row.case.batch}",
            )
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(title="a sequence" if steps > 1 else "a step", xlabel="sparsity", yscale="log")
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("times the best dense engine")
    figure.tight_layout()
    return figure


def main(argv: Sequence[str]) -> int:
    parser = command_line("recurrent", __doc__)
    parser.add_argument("--quick", action="store_true", help="LSTM, hidden 256, batch 1")
    parser.add_argument("--cells", type=among(CELLS), default=tuple(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--hidden", type=listed(int), default=HIDDEN, help="default 256,512,1024")
    parser.add_argument("--batches", type=listed(int), default=BATCHES, help="default 1,8")
    add_report(parser)
    parser.add_argument("--redo", action="store_true", help="measure again what there is")
    given, progress = parser.parse_args(argv), Console()
    sizes = list(itertools.product(given.cells, given.hidden, given.batches))
    if given.quick:
        sizes = [("lstm", 256, 1)]
    wanted = [Case(*size, steps) for size in sizes for steps in (STEPS, 1)]
    variants = [Variant(sparsity) for sparsity in SPARSITIES] + [Variant(CUT_AT, kept) for kept in KEPT]
    rows: Rows[Row] = Rows(given.output / "recurrent" / f"{machine_key()}.jsonl", Row)
    failed = 0
    try:
        if not given.report:
            failed = sweep(
                rows,
                missing(rows, wanted, given.redo),
                partial(measure, variants=variants, progress=progress),
                progress,
                note=lambda row: f"{row.packed[Variant(CUT_AT)][1].median:.2f}x at {CUT_AT:.0%}",
            )
    finally:
        done = sorted(rows.last().values(), key=lambda row: (row.case.steps == 1, row.case.cell != "lstm", row.case))
        if done:
            write_page(given.output, "recurrent", report(done))
            save_png(draw(done), given.output / "recurrent.png")
    return int(failed > 0)
