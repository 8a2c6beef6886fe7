"""Backends: what packs one layer and runs it. One file and one row a backend."""

from autoprune.registry import Registry
from autoprune.repack.backends.base import Backend, LayerForm, Support

BACKENDS: Registry[Backend] = Registry(
    "backend",
    {
        "dense": "autoprune.repack.backends.dense:Dense",
        "torch": "autoprune.repack.backends.portable:Portable",
        "jit": "autoprune.repack.backends.jit:Jit",
    },
)

__all__ = ["BACKENDS", "Backend", "LayerForm", "Support"]
