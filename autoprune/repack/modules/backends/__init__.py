"""Backends: what packs one layer and runs it. One file and one row a backend."""

from autoprune.registry import Registry
from autoprune.repack.modules.backends.base import Backend, LayerForm, Support

BACKENDS: Registry[Backend] = Registry(
    "backend",
    {
        "dense": "autoprune.repack.modules.backends.dense:Dense",
        "torch": "autoprune.repack.modules.backends.portable:Portable",
        "jit": "autoprune.repack.modules.backends.jit:Jit",
    },
)

__all__ = ["BACKENDS", "Backend", "LayerForm", "Support"]
