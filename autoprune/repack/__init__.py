"""Repacked inference: masked weights, reassembled once into smaller dense work, run without a sparse library."""

from autoprune.repack.analysis.branches import Branch, cut_branches_, find_branches, rank_branches
from autoprune.repack.analysis.macs import find_readers, remaining_macs
from autoprune.repack.files import load, save
from autoprune.repack.graph.capture import CaptureError, capture
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.record import Record
from autoprune.repack.model import repack
from autoprune.repack.modules.backends import BACKENDS, Backend, LayerForm, Support
from autoprune.repack.modules.replacement import is_replaceable, lower_layer
from autoprune.repack.onnx.export import EngineCheck, ExportedLayer, ExportReport, export_onnx
from autoprune.repack.quantize import quantize_
from autoprune.repack.report import LayerReport, ProgramModel, RepackedModel, SwappedModel
from autoprune.repack.shrinking import Shrunk, ShrunkLayer, shrink
from autoprune.repack.weights.packed import PackedWeight, pack

__all__ = [
    "BACKENDS",
    "Backend",
    "Branch",
    "CaptureError",
    "EngineCheck",
    "ExportReport",
    "ExportedLayer",
    "Graph",
    "LayerForm",
    "LayerReport",
    "PackedWeight",
    "ProgramModel",
    "Record",
    "RepackedModel",
    "Shrunk",
    "ShrunkLayer",
    "Support",
    "SwappedModel",
    "capture",
    "cut_branches_",
    "export_onnx",
    "find_branches",
    "find_readers",
    "is_replaceable",
    "load",
    "lower_layer",
    "pack",
    "quantize_",
    "rank_branches",
    "remaining_macs",
    "repack",
    "save",
    "shrink",
]
