"""Expand, then prune: a wider model, weak cells driven out under a Gaussian scale mixture, by annealing.

The model is widened first (Chen et al. 2016, Net2Net). The weights of a cell are then taken to be N(0, s^2), with an
inverse-gamma prior on each cell's own s^2 (its limit is Jeffreys'): a Gaussian scale mixture (Andrews and Mallows
1974; Tipping 2001). s^2 is inferred from the cell's energy, and the penalty weighs a cell by the expected 1/s^2. Which
cells are kept is a soft assignment, hardened by lowering a temperature (deterministic annealing, Rose 1998).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.allocation.threshold import Lamp
from autoprune.checks import check_counts, check_numbers
from autoprune.masks import Masks
from autoprune.model.net2wider import expand_
from autoprune.patterns.base import cell_means
from autoprune.plan import Plan
from autoprune.training.base import Signals
from autoprune.training.latent import LatentTraining
from autoprune.training.schedule import rise

OFF = 0.01  # a gate below this is 0
HOT, COLD = 1.0, 0.02  # first and last temperature, in units of the logarithm of energy


class Expand(LatentTraining):
    """Gates each cell by ``sigmoid(log(energy / threshold) / temperature)``, colder and colder, until it is 0 or 1.

    A cell's energy is the mean square of its weights over that of its layer. Cells compare across layers by LAMP; the
    budget is tightened along a cubic. The plan's criteria have no say.

    Args:
        factor: the model's inner widths are multiplied by this first, 1 to 16; 1 leaves it as it is.
        end: fraction of the run at which the masks are final, in (0, 1].
        updates: how often thresholds, gates and variances are inferred until then, >= 1.
        strength: weight decay of a cell whose energy is its layer's mean, >= 0.
        floor: scale of the inverse-gamma prior over that of Jeffreys', > 0: the energy below which a cell's decay
            grows no further.
    """

    strength_range = ("factor", 1.0, 2.0)
    finds_shares = True

    def __init__(
        self,
        factor: float = 1.5,
        end: float = 0.6,
        updates: int = 50,
        strength: float = 5e-4,
        floor: float = 0.02,
    ) -> None:
        owner = "training method 'expand'"
        check_numbers(owner, {"factor": factor}, 1.0, 16.0)
        check_numbers(owner, {"end": end}, 0.0, 1.0, "(]")
        check_numbers(owner, {"strength": strength}, 0.0)
        check_numbers(owner, {"floor": floor}, 0.0, ends="(]")
        check_counts(owner, {"updates": updates})
        self.factor, self.end, self.updates = factor, end, updates
        self.strength, self.floor = strength, floor

    def widen_(self, model: nn.Module, inputs: Any, plan: Plan) -> bool:
        return bool(expand_(model, inputs, self.factor, only=plan.layers))

    def prepare(self) -> None:
        self.gates: dict[str, Tensor] = {}  # layer -> in [0, 1], in the weight's shape; empty once masks are final
        self.precision: dict[str, Tensor] = {}  # layer -> expected 1 / s^2, over that of a cell of mean energy
        self.allocation = Lamp()  # a threshold on the energies themselves starves layers where much is cut
        self._cells = {name: self.pruner.cells(name) for name in self.latent}
        self._final = max(1, math.floor(self.end * self.total_steps))
        self._updates = {math.ceil(self._final * i / self.updates) for i in range(1, self.updates)}
        self._infer()

    def energy(self) -> dict[str, Tensor]:
        """Layer -> mean square of each cell's weights over that of the layer's, ``(cells,)``."""
        squares = {name: latent.square() for name, latent in self.latent.items()}
        relative = {name: square / square.mean().clamp(min=1e-30) for name, square in squares.items()}
        return {name: cell_means(each, self._cells[name])[0] for name, each in relative.items()}

    def temperature(self, step: int) -> float:
        """Falls geometrically from HOT to COLD until the masks are final."""
        return float(HOT * (COLD / HOT) ** min(1.0, step / self._final))

    def update(self, step: int) -> None:
        if step == self._final:
            self.set_masks(self._assign(1.0, self.energy()))
            self.gates, self.precision = {}, {}
        elif step in self._updates and step < self._final:
            self._infer()
            self._gate(step)

    def effective(self, name: str, latent: Tensor) -> Tensor:
        return latent * self.gates[name] if name in self.gates else super().effective(name, latent)

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        if name not in self.precision:
            return gradient  # the masks are final, and hide what is cut
        # through the gate, as the loss sees it: what is nearly cut would wander at full strength, and return by chance
        gated = gradient * self.gates[name] if name in self.gates else gradient
        return gated + self.strength * self.precision[name] * latent

    def _assign(self, fraction: float, energy: Mapping[str, Tensor]) -> Masks:
        """The hard assignment at `fraction` of the plan."""
        sizes = {name: each.sqrt()[self._cells[name]] for name, each in energy.items()}
        return self.pruner.masks(fraction, saliency=sizes, allocation=self.allocation)

    def _infer(self) -> None:
        """The expected precision of each cell given its weights."""
        for name, energy in self.energy().items():
            # inverse-gamma(0, n floor / 2) prior and n weights: E[1 / s^2] = n / (n energy + n floor)
            self.precision[name] = ((1.0 + self.floor) / (energy + self.floor)).float()[self._cells[name]]

    def _gate(self, step: int) -> None:
        """The soft assignment at this step's temperature and share of the plan."""
        energy, temperature = self.energy(), self.temperature(step)
        hard = self._assign(rise(step / self._final), energy)
        self.gates, masks = {}, {}
        for name, mask in hard.items():
            cells = self._cells[name]
            kept, _ = cell_means(mask.double(), cells)
            level = energy[name].clamp(min=1e-30).log()
            alive = kept >= 0.5
            if bool(alive.all()):
                continue
            lowest = level[alive].min() if bool(alive.any()) else level.max()
            threshold = 0.5 * (lowest + level[~alive].max())  # between the last that is kept and the first that is cut
            gate = torch.sigmoid((level - threshold) / temperature)
            gate = torch.where(gate < OFF, 0.0, gate).float()[cells]
            self.gates[name] = gate
            if not bool(gate.all()):
                masks[name] = gate > 0.0
        self.set_masks(masks)

    def signals(self) -> Signals:
        signals = super().signals()
        if not self.gates:
            return signals
        gates = torch.cat([gate.flatten() for gate in self.gates.values()])
        undecided = float(((gates > 0.1) & (gates < 0.9)).float().mean())
        return replace(
            signals,
            scalars={**signals.scalars, "undecided": undecided},
            histograms={**signals.histograms, "gate": gates},
        )

    def state(self) -> dict[str, Tensor]:
        gates = {f"gate.{name}": value for name, value in self.gates.items()}
        return super().state() | gates | {f"precision.{name}": value for name, value in self.precision.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for part, values in (("gate.", self.gates), ("precision.", self.precision)):
            values.clear()
            values |= {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        super().load_state(state)
