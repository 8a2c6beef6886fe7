"""Exported models against the masked ones exported dense: ``python -m benchmarks onnx_export``.

    python -m benchmarks onnx_export                                         # a small CNN and an MLP: three minutes
    python -m benchmarks onnx_export --models residual_cnn,mlp,resnet18      # ten

Each model is pruned, exported for ONNX Runtime and for OpenVINO, and timed there in turns with the same zeros exported
dense: batch 1, one thread, float32. Writes benchmarks/results/onnx_export.md.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.latency.engines import ENGINES
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.timer import Protocol, measure_together, speedup
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerSpec
from autoprune.registry import Choice
from autoprune.repack import export_onnx
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from autoprune.tasks.zoo import build_model
from autoprune.tasks.zoo.initialise import randomise_norms_
from benchmarks.lib.command_line import among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance
from benchmarks.lib.pruning import prune_

HEADER = ("model", "pattern", "sparsity", "engine", "dense ms", "exported ms", "speed-up", "MB", "layers")
CELLS = (("-", 0.0), ("group", 0.75), ("group", 0.9), ("channel", 0.75))
CHOICES = {"-": Choice("unstructured"), "group": Choice("group", {"size": 8}), "channel": Choice("channel")}
PROTOCOL = Protocol(samples=31, warmup=3, threads=1, min_sample_ms=2.0, lead=1)
FEATURES = 4096


def zoo(name: str, size: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        model = build_model(name, {}, in_channels=3, size=size, classes=10, seed=0)
        return randomise_norms_(model, 0), torch.randn(1, 3, size, size)

    return build


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 10)), torch.randn(1, FEATURES)


MODELS = {"residual_cnn": zoo("residual_cnn", 32), "mlp": mlp, "resnet18": zoo("resnet18", 224)}


def to_prune(model: nn.Module, x: Tensor) -> Sequence[LayerSpec]:
    """Every layer but the first convolution, which reads the image, and the classifier."""
    layers = take_inventory(model, x).layers
    return layers[layers[0].kind == "conv2d" : -1]


def cell(name: str, pattern: str, sparsity: float, engine_name: str) -> Sequence[str]:
    """One row of the table."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    prune_(model.eval(), to_prune(model, x), CHOICES[pattern], sparsity)
    engine = ENGINES.get(engine_name)()
    assert isinstance(engine, OnnxEngine)
    with tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
        path = Path(folder) / "model.onnx"
        report = export_onnx(model, x, path, engine=engine_name)
        calls = {"dense": engine.prepare(model, x, 1), "exported": engine.load(path, (x,), 1)}
        found = measure_together(calls, PROTOCOL)
    forms = Counter(row.form for row in report.layers)
    size = f"{report.dense_bytes / 1e6:.2f} -> {report.file_bytes / 1e6:.2f}"
    times = [str(found["dense"]), str(found["exported"]), f"{speedup(found['dense'], found['exported']):.2f}x"]
    layers = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
    return [name, pattern, f"{100 * sparsity:.0f}%", engine_name, *times, size, layers]


def report(rows: Sequence[Sequence[str]]) -> str:
    return page(
        "Exported models against the same zeros exported dense",
        "onnx_export",
        "Batch 1, one thread, float32, random weights pruned by size; "
        f"milliseconds: median (10th-90th percentile) of {PROTOCOL.samples} samples, the two files in turns. Speed-up: "
        "the median of the ratios. Groups are of 8 filters. MB: of the model's weights, and of the exported file. "
        "Layers: `compacted` has fewer channels or filters, `gathered` gathers what a group keeps.",
        f"{Provenance.here()} Load average when written: {os.getloadavg()[0]:.1f}.",
        markdown_table(HEADER, rows, left=4),
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line("onnx_export", __doc__)
    parser.add_argument("--models", type=among(MODELS), default="residual_cnn,mlp", help=f"of {', '.join(MODELS)}")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, rows = Console(), list[Sequence[str]]()
    cells = list(itertools.product(given.models, CELLS, ("onnxruntime", "openvino")))
    try:
        with console.bar("export and time", len(cells)) as bar:
            for model, (pattern, sparsity), engine in cells:
                rows.append(cell(model, pattern, sparsity, engine))
                bar.advance(note=" ".join(rows[-1][:4]))
    finally:
        write_page(given.output, "onnx_export", report(rows))
    return 0
