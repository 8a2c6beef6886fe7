"""Repacked inference: masked weights, reassembled once into smaller dense work, run without a sparse library."""

from autoprune.repack.backends import BACKENDS, Backend, LayerForm, Support
from autoprune.repack.files import load_packed, save_packed
from autoprune.repack.formats import PackedWeight, pack
from autoprune.repack.model import LayerReport, RepackedModel, lower_layer, repack

__all__ = [
    "BACKENDS",
    "Backend",
    "LayerForm",
    "LayerReport",
    "PackedWeight",
    "RepackedModel",
    "Support",
    "load_packed",
    "lower_layer",
    "pack",
    "repack",
    "save_packed",
]
