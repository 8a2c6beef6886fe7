"""What a budget counts: a cost of the layers' sparsities that falls as any of them rises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from autoprune.model.inventory import Inventory


class Cost(ABC):
    """Layer name -> sparsity, to what the pruned model costs. A layer that is not named is dense."""

    @abstractmethod
    def __call__(self, sparsities: Mapping[str, float]) -> float:
        """The cost, > 0; never rises with a sparsity."""


@dataclass(frozen=True)
class WeightCost(Cost):
    """Weights that are left in the prunable layers."""

    inventory: Inventory

    def __call__(self, sparsities: Mapping[str, float]) -> float:
        return sum(layer.weights * (1.0 - sparsities.get(layer.name, 0.0)) for layer in self.inventory.layers)


@dataclass(frozen=True)
class MacsCost(Cost):
    """Multiply-accumulates of one inference that are left in the prunable layers.

    Attributes:
        readers: producer -> the one layer that reads its filters, for the `channel` pattern: an input channel that the
            reader cuts is a filter that the producer need not compute.
    """

    inventory: Inventory
    readers: Mapping[str, str] | None = None

    def __call__(self, sparsities: Mapping[str, float]) -> float:
        readers = self.readers or {}
        return sum(
            layer.macs
            * (1.0 - sparsities.get(layer.name, 0.0))
            * (1.0 - sparsities.get(readers.get(layer.name, ""), 0.0))
            for layer in self.inventory.layers
        )
