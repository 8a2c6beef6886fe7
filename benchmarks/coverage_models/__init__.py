"""The models of ``python -m benchmarks coverage``: other people's, with random weights, by family and name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from autoprune.extras import needs
from benchmarks.coverage_models import from_packages, from_timm, from_torchvision, from_transformers
from benchmarks.coverage_models.subject import Subject

EXTRA = "coverage-models"
FAMILIES: Mapping[str, Mapping[str, Callable[[], Subject]]] = {
    "tv": from_torchvision.MODELS,
    "timm": from_timm.MODELS,
    "hf": from_transformers.MODELS,
    "pypi": from_packages.MODELS,
}
MODELS = {f"{family}:{name}": build for family, models in FAMILIES.items() for name, build in models.items()}


def build(name: str) -> Subject:
    """One of MODELS, the same at every call.

    Raises:
        MissingExtra: its package is not installed.
    """
    torch.manual_seed(0)
    with needs(EXTRA, name):
        return MODELS[name]()
