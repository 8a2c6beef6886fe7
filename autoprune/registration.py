"""Makes Gymnasium know the environments without importing Gymnasium: who only repacks should not wait for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

ENV_ID = "autoprune/Prune-v0"
STEER_ID = "autoprune/Steer-v0"
_ENTRIES = {
    ENV_ID: "autoprune.pipeline.environment:prune_env",
    STEER_ID: "autoprune.pipeline.steer_problems:steer_env",
}
_REGISTRY = "gymnasium.envs.registration"


def register() -> None:
    """Registers the environments: at once where Gymnasium is imported, else as soon as it is."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        _register(registry)
    elif not any(isinstance(finder, _Registering) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registering())


def _register(registry: Any) -> None:
    for name, entry in _ENTRIES.items():
        if name not in registry.registry:
            registry.register(id=name, entry_point=entry)


class _Registering(MetaPathFinder):
    """Finds one module, once, as Python would have."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Loads the module and registers; the module's own loader is then back in its place."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)
