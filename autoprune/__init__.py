"""autoprune: reinforcement-learning auto-pruning for PyTorch, run by repacked inference.

Names are imported when they are first asked for: ``autoprune --help`` does not wait for torch, and whoever only repacks
does not wait for the agents.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autoprune import registration
from autoprune.errors import AutopruneError
from autoprune.extras import needs
from autoprune.version import __version__

if TYPE_CHECKING:
    from autoprune.api import Compressed, compress
    from autoprune.hooks import PruningHooks
    from autoprune.metric import Metric
    from autoprune.model.arguments import Arguments
    from autoprune.model.recurrent.modules import cut_states_
    from autoprune.model.resize import load_shrunk
    from autoprune.plan import Plan
    from autoprune.post_training import PostTrained, prune_post_training
    from autoprune.quantization import dequantize_
    from autoprune.repack import ExportReport, RepackedModel, Shrunk, export_onnx, load, quantize_, repack, save, shrink
    from autoprune.repack.aot.library import Built, build
    from autoprune.target import Target

_CORE = {
    "Arguments": "autoprune.model.arguments",
    "Built": "autoprune.repack.aot.library",
    "ExportReport": "autoprune.repack",
    "Metric": "autoprune.metric",
    "Plan": "autoprune.plan",
    "RepackedModel": "autoprune.repack",
    "Shrunk": "autoprune.repack",
    "Target": "autoprune.target",
    "build": "autoprune.repack.aot.library",
    "cut_states_": "autoprune.model.recurrent.modules",
    "dequantize_": "autoprune.quantization",
    "export_onnx": "autoprune.repack",
    "load": "autoprune.repack",
    "load_shrunk": "autoprune.model.resize",
    "quantize_": "autoprune.repack",
    "save": "autoprune.repack",
    "shrink": "autoprune.repack",
}
_SEARCH = {
    "Compressed": "autoprune.api",
    "PostTrained": "autoprune.post_training",
    "PruningHooks": "autoprune.hooks",
    "compress": "autoprune.api",
    "prune_post_training": "autoprune.post_training",
}

__all__ = [
    "Arguments",
    "AutopruneError",
    "Built",
    "Compressed",
    "ExportReport",
    "Metric",
    "Plan",
    "PostTrained",
    "PruningHooks",
    "RepackedModel",
    "Shrunk",
    "Target",
    "__version__",
    "build",
    "compress",
    "cut_states_",
    "dequantize_",
    "export_onnx",
    "load",
    "load_shrunk",
    "prune_post_training",
    "quantize_",
    "repack",
    "save",
    "shrink",
]


registration.register()


def __getattr__(name: str) -> Any:
    if name in _CORE:
        return getattr(importlib.import_module(_CORE[name]), name)
    if name in _SEARCH:
        with needs("search", f"autoprune.{name}"):
            return getattr(importlib.import_module(_SEARCH[name]), name)
    raise AttributeError(f"module 'autoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Face(ModuleType):
    """``autoprune.repack`` is the function, although importing the package of that name would bind the package."""

    @property
    def repack(self) -> Any:
        return importlib.import_module("autoprune.repack").repack

    @repack.setter
    def repack(self, package: ModuleType) -> None:
        """What Python does when the package has been imported."""


sys.modules[__name__].__class__ = _Face
