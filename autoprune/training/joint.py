"""Joint structure search and training: gates that open and close while the model is trained from its first weights.

Every cell has a score and a soft gate ``sigmoid((score - threshold) / temperature)``, hardened with a straight-through
step. The layers' thresholds come from a small network that reads each layer's statistics; it is trained, with the
scores, by the task's loss through the gates and by the gap to the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from autoprune.allocation import Cost, make_allocation
from autoprune.allocation.threshold import Global
from autoprune.checks import check_flags, check_numbers
from autoprune.masks import sparsity
from autoprune.training.base import Signals
from autoprune.training.gated import CellTable, GatedTraining
from autoprune.training.schedule import check_span, rise

COLD = 0.1  # the temperature at the end, over the one at the start
REFRESHES = 200  # of the layers' statistics, in a run
STEP = 0.01  # of sparsity, to see how a cost changes with it
WIDEST = 0.1  # a gap, over the budget, from which on its pull grows no more
OPEN = 4.0  # spreads below the lowest score, where the threshold of a layer that is to be dense lies
STATISTICS = 7


class Gate(torch.autograd.Function):
    """A weight times its hardened gates; backwards, the gates are the soft ones."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, keep: Tensor, table: CellTable) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(weight, logits, keep)
        return weight * keep

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        weight, logits, keep = ctx.saved_tensors
        soft = logits.sigmoid()
        return gradient * keep, ctx.table.sums(gradient * weight) * soft * (1.0 - soft), None, None


class ThresholdNetwork(nn.Module):
    """A layer's statistics -> how far its threshold lies above its anchor, in spreads of its scores; 0 at the start."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(STATISTICS, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, statistics: Tensor) -> Tensor:
        """``(layers, STATISTICS)`` -> ``(layers,)``."""
        offsets: Tensor = self.out(torch.tanh(self.hidden(statistics)))[:, 0]
        return offsets


def cost_slopes(cost: Cost, names: Iterable[str], sparsities: Mapping[str, float]) -> Tensor:
    """The change of the cost with the sparsity of each named layer, near `sparsities`: ``(layers,)``."""
    slopes = []
    for name in names:
        low = min(max(0.0, sparsities.get(name, 0.0) - STEP / 2), 1.0 - 2 * STEP)
        ends = (cost({**sparsities, name: low}), cost({**sparsities, name: low + STEP}))
        slopes.append((ends[1] - ends[0]) / STEP)
    return torch.tensor(slopes)


class Joint(GatedTraining):
    """Scores of cells and thresholds of layers, trained with the weights; the budget is met along a cubic.

    A score starts as the cell's norm, in standard deviations of the layer's; after that it is a parameter, and follows
    the norm as far as `follow` says. A threshold is the score at which the layer would be as sparse as the allocation
    makes it at that moment, plus what the network adds. At `freeze` the masks are made exactly on the budget, by how
    far the scores are above their thresholds, and the rest trains on.

    Args:
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the plan's budget is to be met, in (begin, 1].
        freeze: fraction of the run after which the masks stay as they are, in [end, 1].
        generator: whether a network makes the thresholds; else each is a free parameter.
        follow: how much of the change of a cell's norm its score takes over, in [0, 1].
        temperature: of the gates at the start, in standard deviations of the layer's scores, > 0; a tenth at `freeze`.
        speed: how far a score may move in the whole run, about, >= 0; a threshold network's weights too.
        strength: of the gap to the budget against the task's loss, >= 0.
        allocation: what shares the plan's budget among the layers before the network has a say: a name, or a table
            with its arguments. The plan's own shares and LAMP's ended alike in what we ran.
    """

    betas = (0.9, 0.99)
    strength_range = ("strength", 0.1, 10.0)

    def __init__(
        self,
        begin: float = 0.1,
        end: float = 0.7,
        freeze: float = 0.85,
        generator: bool = True,
        follow: float = 1.0,
        temperature: float = 1.0,
        speed: float = 15.0,
        strength: float = 1.0,
        allocation: str | Mapping[str, Any] = "lamp",
    ) -> None:
        check_span("joint", begin, end, freeze)
        check_numbers("training method 'joint'", {"follow": follow}, 0.0, 1.0)
        check_numbers("training method 'joint'", {"temperature": temperature}, 1e-3)
        check_numbers("training method 'joint'", {"speed": speed, "strength": strength}, 0.0)
        check_flags("training method 'joint'", {"generator": generator})
        self.begin, self.end, self.freeze, self.generator = begin, end, freeze, generator
        self.follow, self.temperature, self.speed, self.strength = follow, temperature, speed, strength
        self.allocation = make_allocation(allocation)

    def prepare(self) -> None:
        self.refresh_every = max(1, self.total_steps // REFRESHES)
        self.step, self.gap, self.budget = 0, 0.0, 0.0
        self.statistics = torch.zeros(0, STATISTICS)
        self.anchors = self.spreads = self.slopes = torch.zeros(0)
        super().prepare()
        if not self.frozen:
            self._refresh(0)
            self._look(0)

    def _norm(self, name: str) -> Tensor:
        """Root mean square of each cell, in standard deviations of the layer's about their mean: ``(cells,)``."""
        table = self.tables[name]
        norm = (table.sums(self.latent[name].square()) / table.size).sqrt()
        spread = norm.std(correction=0).clamp(min=1e-30)
        return (norm - norm.mean()) / spread

    def make_parameters(self) -> dict[str, Tensor]:
        self.network = ThresholdNetwork()
        self.norms = {name: self._norm(name) for name in self.latent}
        self.first_norms = dict(self.norms)
        scores = {f"score.{name}": norm.clone() for name, norm in self.norms.items()}
        if not self.generator:
            return scores | {"offsets": torch.zeros(len(self.latent))}
        return scores | {f"network.{name}": value for name, value in self.network.named_parameters()}

    def score(self, name: str) -> Tensor:
        """The score of each cell now, ``(cells,)``; differentiable in the parameters."""
        return self.parameters[f"score.{name}"] + self.follow * (self.norms[name] - self.first_norms[name])

    def _offsets(self) -> Tensor:
        """How far each threshold lies above its anchor, in spreads, ``(layers,)``."""
        if not self.generator:
            return self.parameters["offsets"]
        weights = {name: self.parameters[f"network.{name}"] for name, _ in self.network.named_parameters()}
        offsets: Tensor = functional_call(self.network, weights, (self.statistics,))
        return offsets

    @torch.no_grad()
    def _refresh(self, step: int) -> None:
        """Reads the layers' statistics, the allocation's thresholds at this moment, and how the cost changes."""
        fraction = rise((step / self.total_steps - self.begin) / (self.end - self.begin))
        wanted, dense, last = self._shares(fraction), self.cost({}), max(1, len(self.tables) - 1)
        statistics, anchors, spreads = [], [], []
        for depth, name in enumerate(self.tables):
            score = self.score(name)
            mean, spread = score.mean(), score.std(correction=0).clamp(min=1e-6)
            unit = (score - mean) / spread
            moments = [mean, spread.log(), unit.pow(3).mean().clamp(-3, 3), unit.pow(4).mean().log1p()]
            share = 2.0 * (dense - self.cost({name: 0.5})) / dense
            statistics.append([*map(float, moments), depth / last, share, fraction])
            cut = round(wanted[name] * len(score))
            between = score.sort().values[max(0, cut - 1) : cut + 1].mean()
            anchors.append(between if cut else score.min() - OPEN * spread)
            spreads.append(spread)
        self.statistics, self.anchors, self.spreads = (
            torch.tensor(statistics),
            torch.stack(anchors),
            torch.stack(spreads),
        )
        self.budget = self.cost(self.planned.planned(fraction))
        shares = {name: sparsity(mask) for name, mask in self.masks.items()}
        self.slopes = cost_slopes(self.cost, self.tables, shares)

    def _shares(self, fraction: float) -> dict[str, float]:
        """Layer -> sparsity at `fraction` of the plan, shared by the allocation; by the weights' magnitude now."""
        sizes = {name: latent.abs() for name, latent in self.latent.items()}
        return self.allocation.sparsities(replace(self.planned, saliency=sizes), fraction)

    def _look(self, step: int) -> None:
        """Sets the gates' logits, with the graph that leads to the parameters, and the masks they harden to."""
        heat = self.temperature * COLD ** min(1.0, step / self.freeze_step)
        with torch.enable_grad():
            thresholds = self.anchors + self.spreads * self._offsets()
            self.logits = {
                name: (self.score(name) - threshold) / (heat * spread)
                for name, threshold, spread in zip(self.tables, thresholds, self.spreads, strict=True)
            }
        self.thresholds = thresholds.detach()
        with torch.no_grad():
            # a layer that would be cut through keeps its best cell
            alive = {name: (logits > 0) | (logits >= logits.max()) for name, logits in self.logits.items()}
            self.set_masks({name: alive[name][table.cells] for name, table in self.tables.items()})

    def gated(self, name: str, latent: Tensor) -> Tensor:
        gated: Tensor = Gate.apply(latent, self.logits[name], self.masks[name], self.tables[name])  # type: ignore[no-untyped-call]
        return gated

    def pressure(self) -> Tensor:
        """The gap of the masks to the budget of the moment; its gradient is the soft gates', by `slopes`."""
        cost = self.cost({name: sparsity(mask) for name, mask in self.masks.items()})
        kept = [
            (table.size * self.logits[name].sigmoid()).sum() / table.cells.numel()
            for name, table in self.tables.items()
        ]
        change = (self.slopes * -torch.stack(kept)).sum()
        gap = (cost - self.budget + change - change.detach()) / self.budget
        self.gap = gap.item()
        return self.strength / WIDEST * functional.huber_loss(gap, torch.zeros(()), delta=WIDEST)

    def update(self, step: int) -> None:
        self.step = step
        if self.frozen:
            return
        self.norms = {name: self._norm(name) for name in self.latent}
        if step >= self.freeze_step:
            self._look(step)
            over = {name: logits.detach() for name, logits in self.logits.items()}
            lowest = torch.stack([logits.min() for logits in over.values()]).min()
            saliency = {name: (over[name] - lowest)[table.cells] for name, table in self.tables.items()}
            self.set_masks(self.pruner.masks(saliency=saliency, allocation=Global()))
            self.frozen = True
            return
        if step % self.refresh_every == 0:
            self._refresh(step)
        self._look(step)

    def signals(self) -> Signals:
        signals = super().signals()
        if self.frozen:
            return signals
        thresholds = {
            f"threshold/{name}": value for name, value in zip(self.tables, self.thresholds.tolist(), strict=True)
        }
        gates = {f"gates/{name}": logits.detach().sigmoid() for name, logits in self.logits.items()}
        return replace(
            signals,
            scalars={**signals.scalars, **thresholds, "budget_gap": self.gap},
            histograms={**signals.histograms, **gates},
        )

    def state(self) -> dict[str, Tensor]:
        seen = torch.tensor([self.step, self.gap, self.budget, float(self.frozen)], dtype=torch.float64)
        table = torch.cat([self.statistics, torch.stack([self.anchors, self.spreads, self.slopes], dim=1)], dim=1)
        first = {f"first.{name}": norm for name, norm in self.first_norms.items()}
        return super().state() | first | {"seen": seen, "layers": table}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        step, self.gap, self.budget, frozen = state["seen"].tolist()
        self.step, self.frozen = int(step), frozen > 0.5
        table = state["layers"]
        self.statistics = table[:, :STATISTICS].contiguous()
        self.anchors, self.spreads, self.slopes = (column.contiguous() for column in table[:, STATISTICS:].unbind(1))
        self.first_norms = {name: state[f"first.{name}"] for name in self.latent}
        super().load_state(state)
        if not self.frozen:
            self.norms = {name: self._norm(name) for name in self.latent}
            self._look(self.step)
