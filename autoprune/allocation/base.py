"""What an allocation is: a rule that shares a budget among the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from autoprune.allocation.cost import Cost
from autoprune.errors import ConfigError
from autoprune.model.inventory import Inventory
from autoprune.patterns import PATTERNS
from autoprune.patterns.layered import cells_of
from autoprune.plan import Plan

HALVINGS = 40


@dataclass(frozen=True)
class Layers:
    """The layers that compete, and for what.

    Attributes:
        inventory: the model's prunable layers.
        plan: the layers' patterns; its sparsities are the budget.
        saliency: layer -> scores in the weight's shape; negative where a weight is cut already and stays so.
        cost: what the budget counts.
    """

    inventory: Inventory
    plan: Plan
    saliency: Mapping[str, Tensor]
    cost: Cost

    def planned(self, fraction: float) -> dict[str, float]:
        """Layer -> `fraction` of its planned sparsity; layers planned dense are left out and stay dense."""
        return {name: layer.sparsity * fraction for name, layer in self.plan.layers.items() if layer.sparsity > 0.0}

    def meet(self, curve: Callable[[float], dict[str, float]], fraction: float) -> dict[str, float]:
        """The least point of a curve that costs no more than `fraction` of the plan.

        Args:
            curve: a number in [0, 1] -> sparsities that never fall as it rises.
            fraction: of the plan's sparsities, in [0, 1].
        """
        budget = self.cost(self.planned(fraction)) * (1.0 + 1e-9)
        low, high = 0.0, 1.0
        if self._masked_cost(curve(low)) <= budget:
            return curve(low)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self._masked_cost(curve(middle)) <= budget:
                high = middle
            else:
                low = middle
        return curve(high)

    def _masked_cost(self, sparsities: Mapping[str, float]) -> float:
        """The cost of the masks: in whole cells, one of each layer kept at least."""
        kept = {}
        for name, share in sparsities.items():
            weights, size = self.inventory[name].weights, self._cell_sizes[name]
            kept[name] = max(1.0, round((1.0 - share) * weights) / size + 1e-9) // 1 * size / weights
        return self.cost({name: max(0.0, 1.0 - share) for name, share in kept.items()})

    @cached_property
    def cells(self) -> dict[str, Tensor]:
        """Layer -> the cell of each of its weights (`layer_cells`)."""
        return {name: layer_cells(self.inventory, self.plan, name) for name in self.saliency}

    @cached_property
    def _cell_sizes(self) -> dict[str, float]:
        """Weights of a layer's cell, on average."""
        return {name: cells.numel() / (int(cells.max()) + 1) for name, cells in self.cells.items()}

    def check_free(self, allocation: str) -> None:
        """Raises ConfigError when a pattern has one sparsity alone, so that there is nothing to share."""
        for name, layer in self.plan.layers.items():
            if layer.sparsity > 0.0 and not PATTERNS.get(layer.pattern.name).any_sparsity:
                raise ConfigError(
                    f"{allocation} sets each layer's sparsity, but layer {name!r} has the pattern {layer.pattern}, "
                    "which allows one sparsity alone. Use the allocation 'planned' (training methods 'one_shot', "
                    "'gradual', 'sr_ste'), or another pattern."
                )


def layer_cells(inventory: Inventory, plan: Plan, name: str) -> Tensor:
    """The cell of each weight of a layer, by its pattern in the plan; in the weight's shape."""
    return cells_of(PATTERNS.create(plan.layers[name].pattern), inventory[name])


class Allocation(ABC):
    """A rule that says how sparse each layer is, at a cost no higher than the plan's.

    Attributes:
        finds_shares: whether the layers' sparsities are the rule's own, not the plan's.
    """

    finds_shares: ClassVar[bool] = True

    @abstractmethod
    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        """Layer -> sparsity in [0, 1), at no more than the cost of `fraction` of the plan.

        A layer that the plan leaves dense (sparsity 0) takes no part.

        Raises:
            ConfigError: the allocation cannot set the sparsity of a pattern in the plan.
        """
