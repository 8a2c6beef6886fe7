"""Quantising a graph: from calibration batches to a graph with int8 layers."""

from __future__ import annotations

from autoprune.repack.quantize.batches import batches_of
from autoprune.repack.quantize.permute import order_channels
from autoprune.repack.quantize.placement import quantisable
from autoprune.repack.quantize.precision import (
    LayerPrecision,
    Quantised,
    Settings,
    check_named,
    is_wished,
    quantised_graph,
)
from autoprune.repack.quantize.trained import Modules, trained_graph
from autoprune.repack.quantize.training import quantize_

__all__ = [
    "LayerPrecision",
    "Modules",
    "Quantised",
    "Settings",
    "batches_of",
    "check_named",
    "is_wished",
    "order_channels",
    "quantisable",
    "quantised_graph",
    "quantize_",
    "trained_graph",
]  # fmt: skip
