"""Thresholds: what is cut is decided by trained thresholds (Liu et al. 2020, Dynamic Sparse Training).

Added to the paper: cells of any pattern in place of single weights, and a budget, which steers the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.checks import check_numbers
from autoprune.masks import sparsity
from autoprune.training.base import Signals
from autoprune.training.gated import CellTable, GatedTraining
from autoprune.training.schedule import check_span, rise

ALPHA = 1e-3  # the penalty's factor at the start, and where it may go
LOG_ALPHAS = (math.log(1e-9), math.log(1e3))
PROPORTIONAL, INTEGRAL = 30.0, 500.0  # nats of alpha for a gap of all weights; the latter, held for a whole run
WIDEST_GAP = 0.1
CONTROLS = 400  # how often in a run alpha is set anew
SMALLEST = 1e-3  # a threshold when it divides


def long_tailed(x: Tensor) -> Tensor:
    """The estimate of a unit step's derivative: ``2 - 4|x|`` up to 0.4, then 0.4 up to 1, then 0."""
    away = x.abs()
    near = 2.0 - 4.0 * away
    return torch.where(away <= 0.4, near, torch.where(away <= 1.0, 0.4, 0.0))


class Gated(torch.autograd.Function):
    """A weight whose cells are kept where their scores are above their thresholds, by the surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, table: CellTable) -> Tensor:
        score = table.sums(weight.abs()) / table.size
        unit = table.unit(score)
        margin = score / unit - threshold[table.owner]
        gate = (margin > 0).to(weight.dtype)
        ctx.table, ctx.thresholds = table, len(threshold)
        ctx.save_for_backward(weight, gate, margin, unit)
        return weight * gate[table.cells]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The unit counts as a constant."""
        (gradient,) = gradients
        weight, gate, margin, unit = ctx.saved_tensors
        table: CellTable = ctx.table
        to_margin = table.sums(gradient * weight) * long_tailed(margin)
        to_score = to_margin / (unit * table.size)
        to_weight = gradient * gate[table.cells] + to_score[table.cells] * weight.sign()
        to_threshold = to_margin.new_zeros(ctx.thresholds).index_add_(0, table.owner, -to_margin)
        return to_weight, to_threshold, None


class Thresholds(GatedTraining):
    """A threshold a filter (or group of filters that share cells), trained with the weights; what is below is 0.

    The loss has ``alpha * sum(exp(-threshold))`` added. `alpha` is steered so that the budget is met along a cubic;
    then the masks are made exactly on the budget, of the scores over their thresholds, and the rest trains on.
    Scores and thresholds are in units of the root mean square of the layer's scores.

    Args:
        begin: fraction of the run after which cutting begins, in [0, 1).
        end: fraction of the run at which the plan's budget is to be met, in (begin, 1].
        freeze: fraction of the run after which the masks stay as they are, in [end, 1].
        speed: how far a threshold may move in the whole run, about; >= 0.
        least: share of a layer's weights below which its thresholds are set back, in [0, 0.5]; a tenth of what the
            budget leaves where that is less. The paper sets them to 0; here the layer gets its planned share of the
            moment, as a layer that is suddenly dense would throw the budget.
    """

    strength_range = ("speed", 3.0, 30.0)
    betas = (0.5, 0.95)  # alpha moves fast, and old gradients say little of new ones

    def __init__(
        self, begin: float = 0.05, end: float = 0.6, freeze: float = 0.7, speed: float = 10.0, least: float = 0.01
    ) -> None:
        check_span("thresholds", begin, end, freeze)
        check_numbers("training method 'thresholds'", {"speed": speed}, 0.0)
        check_numbers("training method 'thresholds'", {"least": least}, 0.0, 0.5)
        self.begin, self.end, self.freeze, self.speed, self.least = begin, end, freeze, speed, least
        self.allocation = make_allocation("global")

    def prepare(self) -> None:
        super().prepare()
        self.control_every = max(1, self.total_steps // CONTROLS)
        self.log_alpha = self.integral = math.log(ALPHA)
        left = 1.0 - sum(p.sparsity * self._weights(n) for n, p in self.pruner.layers.items()) / max(
            1, sum(self._weights(n) for n in self.latent)
        )
        self.reset_below = min(self.least, left / 10)

    def _weights(self, name: str) -> int:
        return self.latent[name].numel()

    def make_parameters(self) -> dict[str, Tensor]:
        return {name: torch.zeros(table.thresholds) for name, table in self.tables.items()}

    def gated(self, name: str, latent: Tensor) -> Tensor:
        gated: Tensor = Gated.apply(latent, self.parameters[name], self.tables[name])  # type: ignore[no-untyped-call]
        return gated

    def pressure(self) -> Tensor:
        terms = [value.neg().exp().sum() for value in self.parameters.values()]
        return math.exp(self.log_alpha) * torch.stack(terms).sum()

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.frozen:
            return
        if step >= self.freeze_step:
            self.set_masks(self.pruner.masks(saliency=self._over_thresholds(), allocation=self.allocation))
            self.frozen = True
        elif step % self.control_every == 0:
            self.set_masks({name: self._alive(name)[table.cells] for name, table in self.tables.items()})
            self._control(step)

    def _alive(self, name: str) -> Tensor:
        """Which cells are kept now, ``(cells,)``."""
        table = self.tables[name]
        return table.scores(self.latent[name]) > self.parameters[name][table.owner]

    def _over_thresholds(self) -> dict[str, Tensor]:
        found = {}
        for name, table in self.tables.items():
            threshold = self.parameters[name].clamp(min=SMALLEST)[table.owner]
            found[name] = (table.scores(self.latent[name]) / threshold)[table.cells]
        return found

    def _control(self, step: int) -> None:
        """Raises alpha where too much is left, lowers it where too little is."""
        shares = {name: sparsity(mask) for name, mask in self.masks.items()}
        fraction = rise((step / self.total_steps - self.begin) / (self.end - self.begin))
        wanted = self.planned.planned(fraction)
        gap = (self.cost(shares) - self.cost(wanted)) / self.cost({})
        gap = max(-WIDEST_GAP, min(WIDEST_GAP, gap))
        low, high = LOG_ALPHAS
        self.integral += INTEGRAL * gap * self.control_every / self.total_steps
        self.integral = max(low, min(high, self.integral))
        self.log_alpha = max(low, min(high, self.integral + PROPORTIONAL * gap))
        for name, share in shares.items():
            if 1.0 - share < self.reset_below:
                rising = self.tables[name].scores(self.latent[name]).sort().values
                cut = min(len(rising) - 1, int(wanted[name] * len(rising)))
                self.parameters[name].fill_(float(rising[cut - 1]) if cut else 0.0)
            self.parameters[name].clamp_(min=0.0)  # at 0 nothing is cut

    def signals(self) -> Signals:
        signals = super().signals()
        values = {name: value.detach() for name, value in self.parameters.items()}
        means = {f"threshold/{name}": float(value.mean()) for name, value in values.items()}
        histograms = {f"thresholds/{name}": value.clone() for name, value in values.items()}
        own = {"alpha": 0.0 if self.frozen else math.exp(self.log_alpha), **means}
        return replace(
            signals, scalars={**signals.scalars, **own}, histograms={**signals.histograms, **histograms}
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        control = torch.tensor([self.log_alpha, self.integral, float(self.frozen)], dtype=torch.float64)
        return super().state() | {"control": control}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.log_alpha, self.integral, frozen = state["control"].tolist()
        self.frozen = frozen > 0.5
        super().load_state(state)
