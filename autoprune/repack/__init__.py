"""Repacked inference: masked weights, reassembled once into smaller dense work, run without a sparse library."""

from autoprune.repack.backends import BACKENDS, Backend, LayerForm, Support
from autoprune.repack.branches import Branch, cut_branches_, find_branches, rank_branches
from autoprune.repack.export import EngineCheck, ExportedLayer, ExportReport, export_onnx
from autoprune.repack.files import load, save
from autoprune.repack.formats import PackedWeight, pack
from autoprune.repack.macs import find_readers, remaining_macs
from autoprune.repack.model import repack
from autoprune.repack.program.capture import CaptureError, capture
from autoprune.repack.program.graph import Graph
from autoprune.repack.program.record import Record
from autoprune.repack.report import LayerReport, ProgramModel, RepackedModel, SwappedModel
from autoprune.repack.swap import lower_layer

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
    "Support",
    "SwappedModel",
    "capture",
    "cut_branches_",
    "export_onnx",
    "find_branches",
    "find_readers",
    "load",
    "lower_layer",
    "pack",
    "rank_branches",
    "remaining_macs",
    "repack",
    "save",
]
