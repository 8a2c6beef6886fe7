"""`python -m benchmarks layers`, and the roofline of `python -m benchmarks engine`, on times that are made up."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.registry import Choice
from autoprune.repack.tuning.layer_times import LayerTime
from benchmarks import engine_report, layers
from benchmarks.lib.pruning import pruned


def row(median_us: float, flops: int = 1_000_000, dense_us: float = 100.0, kind: str = "conv2d") -> LayerTime:
    return LayerTime("conv", kind, "jit", 0.75, 8, None, flops, 100_000, median_us, median_us, dense_us, "contiguous")


def test_a_row_a_sparsity_and_what_was_reached() -> None:
    cells = list(itertools.product(layers.SPARSITIES, layers.GROUP_SIZES))
    titles = [title for title, _, _ in layers.layers()]
    assert {layers.title_of(*each) for each in layers.RESNET18} < set(titles)
    assert layers.LINEAR in titles
    lines = layers.rows("conv", dict.fromkeys(cells, row(25.0)), 80.0)
    assert len(lines) == len(layers.SPARSITIES)
    assert lines[0].startswith("| conv | 100.0 contiguous | 0.5 | 25.0 (4.00x, 50%) |")
    found = {title: dict.fromkeys(cells, row(25.0)) for title in titles}
    found["conv 64->64, 56x56, 3x3"] = dict.fromkeys(cells, row(12.5))
    text = "\n".join(layers.goals(found, 80.0))
    assert "1 of 7; lowest 50%" in text
    assert "90%, G=16: 6x over dense | 4.00x" in text


def test_peaks_are_told_of_the_precisions_that_the_machine_has() -> None:
    text = layers.peaks_text(80.0, 640.4, None, "VNNI")
    assert text.startswith("Peak: 80 GFLOP/s")
    assert text.endswith(
        "Dot products of bytes (VNNI): 640 G a second. Dot products of bfloat16 numbers: no instruction."
    )


def test_only_a_copy_is_pruned() -> None:
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    model = nn.Sequential(conv)
    found = take_inventory(model, torch.zeros(1, 8, 5, 5), min_weights=1).layers
    cut = pruned(model, found, Choice("group", {"size": 8}), 0.75)
    assert sparsity(weight_of(cut, "0")) == pytest.approx(0.75, abs=0.02)
    assert sparsity(conv.weight) == 0.0


def test_the_roofline_shows_what_multiplies_under_every_roof(tmp_path: Path) -> None:
    rows = [row(25.0), row(50.0, kind="linear"), row(10.0, flops=0, kind="copy")]
    figure = engine_report.roofline(rows, "a model", 80.0, {"memory": 10.0, "shared cache": 40.0})
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["memory, 10 GB/s", "shared cache, 40 GB/s", "FMA peak, 80 GFLOP/s", "conv2d", "linear"]
    memory = np.asarray(axes.get_lines()[0].get_xydata())
    assert memory[1].tolist() == pytest.approx([8.0, 80.0]), "where the roofs meet"
    marks = [np.asarray(mark.get_offsets()).tolist() for mark in axes.collections]
    assert marks == [[[10.0, 40.0]], [[10.0, 20.0]]]
    assert engine_report.save_roofline(figure, tmp_path).read_bytes().startswith(b"\x89PNG")
