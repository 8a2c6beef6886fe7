"""autoprune: reinforcement-learning auto-pruning for PyTorch, run by repacked inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autoprune import registration
from autoprune.errors import AutopruneError
from autoprune.extras import needs
from autoprune.metric import Metric
from autoprune.model.arguments import Arguments
from autoprune.model.recurrent.modules import cut_states_
from autoprune.plan import Plan

# Not lazily: the name must be bound after the package of the same name, or that would shadow the function.
from autoprune.repack import ExportReport, RepackedModel, export_onnx, load, repack, save
from autoprune.target import Target
from autoprune.version import __version__

if TYPE_CHECKING:
    from autoprune.api import Compressed, compress
    from autoprune.hooks import PruningHooks

# Imported when first asked for: whoever only repacks should not wait for the agents.
_LAZY = {"Compressed": "autoprune.api", "PruningHooks": "autoprune.hooks", "compress": "autoprune.api"}

__all__ = [
    "Arguments",
    "AutopruneError",
    "Compressed",
    "ExportReport",
    "Metric",
    "Plan",
    "PruningHooks",
    "RepackedModel",
    "Target",
    "__version__",
    "compress",
    "cut_states_",
    "export_onnx",
    "load",
    "repack",
    "save",
]


registration.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    with needs("search", f"autoprune.{name}"):
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
