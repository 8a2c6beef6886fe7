"""Models pruned by magnitude, every layer to the same sparsity, without any training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from autoprune.masks import Masks, apply_masks_
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.patterns.layered import mask_of
from autoprune.plan import LayerSpec
from autoprune.registry import Choice

Model = TypeVar("Model", bound=nn.Module)


def magnitude_masks(model: nn.Module, layers: Iterable[LayerSpec], pattern: Choice, sparsity: float) -> Masks:
    """The pattern's masks of these layers of the model; none at sparsity 0."""
    made = PATTERNS.create(pattern)
    chosen = layers if sparsity else ()
    return {layer.name: mask_of(made, layer, weight_of(model, layer.name).detach().abs(), sparsity) for layer in chosen}


def prune_(model: Model, layers: Iterable[LayerSpec], pattern: Choice, sparsity: float) -> Model:
    """Cuts weights of the model in place, and returns it."""
    apply_masks_(model, magnitude_masks(model, layers, pattern, sparsity))
    return model


def pruned(model: Model, layers: Iterable[LayerSpec], pattern: Choice, sparsity: float) -> Model:
    """A copy of the model with weights cut."""
    return prune_(copy.deepcopy(model), layers, pattern, sparsity)
