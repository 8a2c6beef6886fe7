"""Quantising a graph: from calibration batches to a graph with int8 layers."""

from __future__ import annotations

from autoprune.repack.quantize.placement import quantisable
from autoprune.repack.quantize.precision import LayerPrecision, Quantised, Settings, quantised_graph

__all__ = ["LayerPrecision", "Quantised", "Settings", "quantisable", "quantised_graph"]
