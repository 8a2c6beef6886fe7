"""Methods whose cells have gates with parameters of their own, trained by the loss until the budget is met."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.allocation import Cost, Layers, WeightCost
from autoprune.model.weights import as_read
from autoprune.training.latent import LatentTraining


@dataclass(frozen=True)
class CellTable:
    """Where the weights of each cell lie, so that sums over cells need no scattered addition.

    Attributes:
        cells: the cell of each weight, in the weight's shape.
        places: the weights of each cell in the flat weight, ``(cells, largest)``; past its end where a cell is smaller.
        size: weights of each cell, ``(cells,)``.
        owner: the threshold each cell is compared with, ``(cells,)``.
        thresholds: how many there are.
    """

    cells: Tensor
    places: Tensor
    size: Tensor
    owner: Tensor
    thresholds: int

    @classmethod
    def of(cls, cells: Tensor, turned: bool = False) -> CellTable:
        """The table of a layer's cells, int64 from 0, in the weight's shape; `turned`: that has a filter a column."""
        flat = cells.flatten()
        size = torch.bincount(flat)
        first = size.cumsum(0) - size
        order = flat.argsort(stable=True)
        places = torch.full((len(size), int(size.max())), len(flat))
        sorted_cells = flat[order]
        places[sorted_cells, torch.arange(len(flat)) - first[sorted_cells]] = order
        owner = _owners(as_read(cells, turned), len(size))
        return cls(cells, places, size.float(), owner, int(owner.max()) + 1)

    def sums(self, values: Tensor) -> Tensor:
        """The sum of `values`, in the weight's shape, over each cell: ``(cells,)``."""
        flat = values.flatten()
        if self.places.shape[1] == 1:
            return flat[self.places[:, 0]]
        if self.places.numel() > len(flat):
            flat = torch.cat([flat, flat.new_zeros(1)])
        return flat[self.places].sum(dim=1)

    def scores(self, weight: Tensor) -> Tensor:
        """Mean magnitude of each cell over the root mean square of the layer's, ``(cells,)``."""
        score = self.sums(weight.abs()) / self.size
        return score / self.unit(score)

    def unit(self, score: Tensor) -> Tensor:
        """What scores and thresholds of the layer are measured in; a scalar."""
        return score.square().mean().sqrt().clamp(min=1e-30)


def _owners(cells: Tensor, count: int) -> Tensor:
    """The threshold of each cell: one for the filters that share cells; the layer's where a threshold had one cell."""
    flat = cells.flatten()
    filters = len(cells)
    label = torch.arange(filters)
    while True:  # filters that share a cell, directly or through others, take the least of their numbers
        lowest = torch.full((count,), filters).scatter_reduce(
            0, flat, label.repeat_interleave(len(flat) // filters), "amin"
        )
        joined = lowest[cells].reshape(filters, -1).amin(dim=1)
        if torch.equal(joined, label):
            break
        label = joined
    _, owner = lowest.unique(return_inverse=True)
    return owner if len(owner) > int(owner.max()) + 1 else torch.zeros_like(owner)


class GatedTraining(LatentTraining):
    """A latent method that cuts by gates with parameters of their own, until its masks are made on the budget.

    Until then the gradients are those of ``loss + pressure``, as if the model computed `gated` itself in its forward
    pass; a `frozen` method trains what its masks leave.

    Attributes:
        freeze: fraction of the run after which the masks stay as they are, in [0, 1].
        speed: how far a parameter may move in the whole run, about; >= 0.
        betas: of the Adam that trains the parameters.
        cost: what the plan's budget counts.
        planned: the layers, as the plan has them.
        tables: layer -> its cells.
        parameters: name -> leaf tensor of the method's own, trained by `own`.
        own: the optimizer of `parameters`.
        freeze_step: the step of `freeze`.
        frozen: whether it is over; from the start when the plan prunes nothing.
    """

    finds_shares = True
    freeze: float
    speed: float
    betas: tuple[float, float]
    cost: Cost
    planned: Layers
    tables: dict[str, CellTable]
    parameters: dict[str, Tensor]
    own: torch.optim.Optimizer
    freeze_step: int
    frozen: bool

    @abstractmethod
    def make_parameters(self) -> dict[str, Tensor]:
        """The method's own parameters at the start, called once `latent` and `tables` are there."""

    @abstractmethod
    def gated(self, name: str, latent: Tensor) -> Tensor:
        """The weight the model computes with; differentiable in `latent` and in `parameters`."""

    @abstractmethod
    def pressure(self) -> Tensor:
        """Added to the loss; a scalar, differentiable in `parameters`."""

    def prepare(self) -> None:
        pruner = self.pruner
        pruner.plan.check_layers(pruner.inventory.names)
        self.cost = pruner.cost or WeightCost(pruner.inventory)
        self.planned = Layers(pruner.inventory, pruner.plan, {}, self.cost)
        self.planned.check_free(f"training method {type(self).__name__.lower()!r}")
        self.tables = {name: CellTable.of(pruner.cells(name), pruner.inventory[name].turned) for name in self.latent}
        self.frozen = not self.latent
        self.freeze_step = max(1, round(self.freeze * self.total_steps))
        self.parameters = {name: value.detach().requires_grad_() for name, value in self.make_parameters().items()}
        given = list(self.parameters.values()) or [torch.zeros(0, requires_grad=True)]
        self.own = torch.optim.Adam(given, lr=self.speed / self.total_steps, betas=self.betas)

    def effective(self, name: str, latent: Tensor) -> Tensor:
        return super().effective(name, latent) if self.frozen else self.gated(name, latent)

    def before_step(self, step: int) -> None:
        gradients = {name: self.pruner.weight(name).grad for name in self.latent}
        with torch.enable_grad():
            leaves = {name: latent.detach().requires_grad_() for name, latent in self.latent.items()}
            surrogate = torch.zeros(()) if self.frozen else self.pressure()  # its gradient is that of loss + pressure
            for name, gradient in gradients.items():
                if gradient is not None:
                    surrogate = surrogate + (self.effective(name, leaves[name]) * gradient).sum()
            self.own.zero_grad()
            if surrogate.requires_grad:
                surrogate.backward()
        with torch.no_grad():
            for name, leaf in leaves.items():
                weight = self.pruner.weight(name)
                if weight.grad is not None:
                    weight.grad.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                weight.copy_(leaf)
        self.own.step()
        self._place_rows_()

    def state(self) -> dict[str, Tensor]:
        own = {f"own.{name}": value.detach() for name, value in self.parameters.items()}
        for index, values in self.own.state_dict()["state"].items():
            own |= {f"optimizer.{index}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
        return super().state() | own

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state[f"own.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = value
        groups = self.own.state_dict()["param_groups"]
        self.own.load_state_dict({"state": moments, "param_groups": groups})
        super().load_state(state)
