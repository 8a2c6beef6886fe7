"""A benchmark of one model as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoprune.latency.engines import ENGINES, baselines, best_engine
from autoprune.latency.timer import Latency, speedup
from autoprune.precision import Precision
from autoprune.repack import ExportReport, LayerReport, RepackedModel, Shrunk
from autoprune.repack.onnx.export import CANNOT_RUN, RIGHT, WRONG
from autoprune.repack.tuning.cache_model import What
from autoprune.repack.tuning.layer_memory import LayerMemory
from autoprune.repack.tuning.layer_times import LayerTime
from autoprune.report.table import MISSING, ROUNDED, decibels, markdown_table, microseconds, percent, rounding, times

EAGER = "eager"


REPACKED = "repacked"


@dataclass(frozen=True)
class Peak:
    """What one core of this machine reaches with one instruction alone.

    Attributes:
        instruction: what it does.
        gflops: billions of products and sums a second.
    """

    instruction: str
    gflops: float


@dataclass(frozen=True)
class Bench:
    """What `bench_model` found.

    Attributes:
        fast: the repacked model.
        latencies: of every dense engine (``eager`` is the model itself) and of the repacked model, in turns.
        left_out: engine -> why it is missing: it is not installed, cannot run the model, or computes something else.
        layers: a row an operation of the program; empty where the model is no whole program.
        peak: of the products of the model's precision; None without layers.
        precision: that the model was repacked in.
        snr_db: what does not compute in float32 -> how far its error lies below the output, decibels.
    """

    fast: RepackedModel
    latencies: dict[str, Latency]
    left_out: dict[str, str]
    layers: tuple[LayerTime, ...]
    peak: Peak | None
    precision: Precision = "float32"
    snr_db: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The fastest dense engine of those that the repacked model is compared with."""
        ms = {name: latency.median_ms for name, latency in self.latencies.items()}
        return best_engine(ms, baselines(self.precision))

    def text(self) -> str:
        """The tables of whole models and of layers, and in int8 of what became of each layer."""
        parts = [models_table(self)]
        if self.peak is None:
            parts.append("Not one program, so layers were timed when they were chosen:\n\n" + repack_text(self.fast))
        else:
            parts.append(layers_table(self.layers, self.peak))
        if self.precision != "float32":
            parts.append(precision_table(self.fast.report))
        return "\n".join(parts)


def models_table(bench: Bench) -> str:
    """The whole model in every form; ratios are medians over the rounds."""
    best, compared = bench.latencies[bench.best], {*baselines(bench.precision), REPACKED}
    rows, rounded = [], bool(bench.snr_db)
    for name, latency in bench.latencies.items():
        precision = bench.precision if name == REPACKED else ENGINES.get(name).precision
        label = {EAGER: "the model itself, torch eager"}.get(name, name)
        label += ", best dense" if name == bench.best else "" if name in compared else f" ({precision}: not compared)"
        told = (precision, decibels(bench.snr_db.get(name))) if rounded else ()
        rows.append((label, *told, str(latency), times(speedup(best, latency))))
    threads = bench.latencies[REPACKED].threads
    more = ("precision", "SNR dB") if rounded else ()
    header = (f"model, {threads} thread(s)", *more, "latency ms (p10-p90)", "over the best dense")
    table = markdown_table(header, rows)
    missing = "".join(f"\n{name} left out: {why}\n" for name, why in bench.left_out.items())
    return table + missing


def layers_table(rows: Sequence[LayerTime], peak: Peak) -> str:
    """A row an operation."""
    header = (
        "layer", "kind", "sparsity", "dense best us", "format", "backend", "G", "cut", "us", "min us", "speed-up",
        "GFLOP/s", f"of {peak.gflops:.0f} peak", "FLOP/byte",
    )  # fmt: skip
    cells = []
    for row in rows:
        cut = row.tiling
        cells.append((
            row.name,
            row.kind,
            percent(row.sparsity, 0),
            microseconds(row.dense_us),
            row.dense_format or MISSING,
            row.backend,
            str(row.group_size or MISSING),
            MISSING if cut is None else f"{cut.block}x{cut.chunk or 'all'}{'' if cut.inputs_first else ' weights'}",
            microseconds(row.median_us),
            microseconds(row.min_us),
            times(None if row.dense_us is None else row.dense_us / row.median_us),
            f"{row.gflops:.1f}" if row.flops else MISSING,
            percent(row.gflops / peak.gflops, 0) if row.flops else MISSING,
            f"{row.intensity:.1f}" if row.flops else MISSING,
        ))  # fmt: skip
    dense, total = sum(row.dense_us or 0.0 for row in rows), sum(row.median_us for row in rows)
    lines = [""] * len(header)
    lines[0], lines[3], lines[8] = "all of these", microseconds(dense), microseconds(total)
    about = (
        f"One thread; medians over the rounds, inside whole inferences. Measured {peak.instruction} peak: "
        f"{peak.gflops:.0f} GFLOP/s a core. GFLOP/s count kept weights only. Dense: torch's own layer, without what is "
        "fused into ours. Cut: positions x groups an item.\n\n"
    )
    return about + markdown_table(header, [*cells, lines], left=2)


def precision_table(rows: Sequence[LayerReport]) -> str:
    """What became of each layer where not all are float32."""
    cells = [(row.name, *rounding(row), row.why) for row in rows]
    return markdown_table(("layer", *ROUNDED, "why"), cells, remarks=True)


def memory_table(rows: Sequence[LayerMemory]) -> str:
    """What packed layers take in a file and fetch in an inference."""
    encodings = list(rows[0].position_bits) if rows else []
    header = (
        "layer", "sparsity", "G", "dense KB", "in a file KB", "smaller", "told by",
        *(f"{name} bits" for name in encodings), *(f"{what.name.lower()} KB" for what in What),
    )  # fmt: skip
    cells = []
    for row in rows:
        fetched = [None if row.fetched is None else row.fetched.bytes_of(what) for what in What]
        cells.append((
            row.name, percent(row.sparsity, 0), str(row.group_size), _kilobytes(row.dense_bytes),
            _kilobytes(row.stored_bytes), times(row.dense_bytes / max(1, row.stored_bytes)),
            f"{row.encoding}{'' if row.shared else ', a filter'}",
            *(_bits(row.position_bits[name]) for name in encodings),
            *(MISSING if each is None else _kilobytes(each) for each in fetched),
        ))  # fmt: skip
    dense, stored = sum(row.dense_bytes for row in rows), sum(row.stored_bytes for row in rows)
    totals = [sum(row.fetched.bytes_of(what) for row in rows if row.fetched is not None) for what in What]
    whole = ("all of these", "", "", _kilobytes(dense), _kilobytes(stored), times(dense / max(1, stored)), "")
    about = (
        "Bits that tell a nonzero weight's position: once a filter / once a group. Input, weight, index and output: "
        "what one inference fetches into a cache of 32 KB, 8 ways and lines of 64 bytes, modelled; one thread.\n\n"
    )
    return about + markdown_table(
        header, [*cells, (*whole, *[""] * len(encodings), *(_kilobytes(each) for each in totals))]
    )


def _kilobytes(count: int) -> str:
    return f"{count / 1024:.1f}"


def _bits(each: tuple[float | None, float | None]) -> str:
    return MISSING if each == (None, None) else "/".join(MISSING if bits is None else f"{bits:.2f}" for bits in each)


def repack_text(model: RepackedModel) -> str:
    """What became of the whole, where it is no program, and of each layer."""
    rounded = any(row.precision != "float32" for row in model.report)
    rows = [
        [
            row.name,
            percent(row.sparsity, 0),
            str(row.group_size),
            row.backend,
            microseconds(row.dense_us),
            microseconds(row.packed_us),
            *(rounding(row) if rounded else ()),
            row.why,
        ]
        for row in model.report
    ]
    more = ROUNDED if rounded else ()
    table = markdown_table(("layer", "sparsity", "group", "backend", "dense us", "packed us", *more, "why"), rows)
    return f"{model.summary}\n\n{table}" if model.summary else table


def shrunk_text(shrunk: Shrunk) -> str:
    """What became of each module of a model whose dead channels were cut out."""
    rows = [[row.name, row.kind, _extents(row.before), _extents(row.after), row.why] for row in shrunk.report]
    table = markdown_table(("module", "kind", "weight before", "after", "why not smaller"), rows, left=2)
    return f"{sum(each.numel() for each in shrunk.model.parameters()):,} parameters are left.\n\n{table}"


def _extents(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def export_text(report: ExportReport) -> str:
    """What became of each layer of an exported model, and of its size and speed."""
    rows = [
        [row.name, percent(row.sparsity, 0), row.form, microseconds(row.dense_us), microseconds(row.packed_us), row.why]
        for row in report.layers
    ]
    table = markdown_table(("layer", "sparsity", "exported as", "dense us", "packed us", "why"), rows)
    batch = "any batch size" if report.dynamic else "the example's batch size only"
    right = ", ".join(row.engine for row in report.checked if row.verdict == RIGHT)
    checked = f"equal to the model in {right}" if right else "not checked: no engine is installed"
    told = f"{report.file_bytes:,} bytes (the model's own weights: {report.dense_bytes:,}); {batch}; {checked}."
    if report.dense_ms is not None and report.exported_ms is not None:
        told += f" In {report.engine}: {report.exported_ms:.3f} ms, exported dense {report.dense_ms:.3f} ms."
    others = [f"\n{row}" for row in report.checked if row.verdict in (WRONG, CANNOT_RUN)]
    return f"{table}\n{told}{''.join(others)}"
