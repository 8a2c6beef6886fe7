"""ADMM draws weights towards their projections onto the masks, then cuts (Zhang et al. 2018; Lee et al. 2025, ELSA).

The problem "least loss over weights that a mask allows" is split in two: weights that train, and their nearest weights
that a mask allows, found exactly. Dual variables add up how far the two are apart, so that they meet in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.checks import check_counts, check_numbers
from autoprune.masks import Masks
from autoprune.patterns.base import cell_sizes
from autoprune.training.base import Pruner, Signals, SparseTraining
from autoprune.training.schedule import CUBIC, check_span, cuts


class Admm(SparseTraining):
    """Projects at `updates` steps, under a penalty that rises; at the last one it cuts, and what is left trains on.

    The loss has ``rho / 2 * (weight - target + dual)^2`` added, summed over the weights. A projection makes
    ``weight + dual`` the new target, the smallest cells by their norms set to zero, and adds ``weight - target`` to the
    dual. The model is dense until the cut: what is left needs most of the run to recover.

    Args:
        begin: fraction of the run after which projections begin, in [0, 1).
        end: fraction of the run at which the masks are made, in (begin, 1].
        updates: projections, evenly spaced, the last of them the cut; >= 1.
        strength: rho at the end, > 0; a step of gradient descent closes ``learning_rate * rho`` of the distance.
        exponent: of rho's rise from 0, in [0.1, 10]; 1 is even, more rises earlier.
        allocation: what shares the plan's budget among the layers: a name, or a table with its arguments.
    """

    strength_range = ("strength", 0.03, 3.0)

    def __init__(
        self,
        begin: float = 0.0,
        end: float = 0.4,
        updates: int = 10,
        strength: float = 1.0,
        exponent: float = CUBIC,
        allocation: str | Mapping[str, Any] = "planned",
    ) -> None:
        check_span("admm", begin, end)
        check_counts("training method 'admm'", {"updates": updates})
        check_numbers("training method 'admm'", {"strength": strength}, 1e-9)
        check_numbers("training method 'admm'", {"exponent": exponent}, 0.1, 10.0)
        self.begin, self.end, self.updates = begin, end, updates
        self.strength, self.exponent = strength, exponent
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner, self.masks = pruner, {}
        self._fractions = cuts(self.begin, self.end, self.updates, total_steps, self.exponent)
        self._cut_step = max(self._fractions)
        self._cells = {name: pruner.cells(name) for name in pruner.layers}
        weights = {name: pruner.weight(name).detach() for name in pruner.layers}
        self.target = {name: weight.clone() for name, weight in weights.items()}
        self.dual = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.rho = 0.0

    def before_step(self, step: int) -> None:
        if self.rho == 0.0:
            return
        with torch.no_grad():
            for name, target in self.target.items():
                weight = self.pruner.weight(name)
                if weight.grad is not None:
                    weight.grad.add_(weight - target + self.dual[name], alpha=self.rho)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step == self._cut_step:
            self.rho = 0.0
            self.masks = self._masks({name: self.pruner.weight(name) for name in self.target})
        elif step in self._fractions:
            self._project(self.strength * self._fractions[step])
        self.pruner.apply_(self.masks)

    def _project(self, rho: float) -> None:
        """New targets and duals, for the steps to come under `rho`."""
        sums = {name: self.pruner.weight(name) + dual for name, dual in self.dual.items()}
        masks = self._masks(sums)
        for name, value in sums.items():
            self.target[name] = value * masks[name] if name in masks else value.clone()
            # the force of a dual is rho times it, and stays when rho changes
            self.dual[name] = (value - self.target[name]) * (self.rho / rho)
        self.rho = rho

    def _masks(self, weights: Mapping[str, Tensor]) -> Masks:
        """What the nearest weights that the plan allows keep."""
        sizes = {name: cell_sizes(weight, self._cells[name])[self._cells[name]] for name, weight in weights.items()}
        return self.pruner.masks(saliency=sizes, allocation=self.allocation)

    def signals(self) -> Signals:
        """With `distance`, of the weights from their targets over the weights' norm; 0 once they are cut."""
        signals = super().signals()
        apart = total = 0.0
        for name, target in self.target.items():
            weight = self.pruner.weight(name).detach()
            apart += 0.0 if self.masks else float((weight - target).square().sum())
            total += float(weight.square().sum())
        return replace(signals, scalars={**signals.scalars, "distance": (apart / total) ** 0.5 if total else 0.0})

    def state(self) -> dict[str, Tensor]:
        masks = {f"mask.{name}": mask for name, mask in self.masks.items()}
        targets = {f"target.{name}": target for name, target in self.target.items()}
        duals = {f"dual.{name}": dual for name, dual in self.dual.items()}
        return masks | targets | duals | {"rho": torch.tensor(self.rho, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name.removeprefix("mask."): mask for name, mask in state.items() if name.startswith("mask.")}
        self.target = {name: state[f"target.{name}"].clone() for name in self.target}
        self.dual = {name: state[f"dual.{name}"].clone() for name in self.dual}
        self.rho = float(state["rho"])
