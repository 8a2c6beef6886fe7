"""What steering sees of a training and what it may order: numbers of fixed length, whatever the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from autoprune.allocation import ALLOCATIONS, Layers
from autoprune.allocation.base import Allocation
from autoprune.masks import sparsity
from autoprune.plan import LayerSpec
from autoprune.registry import Choice
from autoprune.training.schedule import rise

STEERING_VERSION = 1  # of observations and actions; a policy fits one
SLICES = 30  # of a training, an order each
END = 0.5  # fraction of the training at which the zero action meets the plan, along a cubic
RULES: Mapping[str, str] = {"uniform": "uniform", "erk": "erk", "lamp": "lamp", "gradient": "global"}
"""What a rule is called -> the allocation that it is; `gradient` compares saliency by gradients."""
ACTION_NAMES = ("cut", *RULES, "regrow", "learning_rate", "distillation")
STATE_NAMES = (
    "progress", "remaining", "ahead", "target", "layers",
    "calibration loss", "calibration trend", "training loss", "training trend",
    "drift", "regrowth",
    "margin at 5%", "least margin at 5%", "margin at 50%",
    "gradient of cut", "most gradient of cut",
    "sparsity spread", "most sparsity", "least sparsity",
)  # fmt: skip
OBSERVATION_NAMES = (*STATE_NAMES, *(f"previous {name}" for name in ACTION_NAMES))
LIMIT = 10.0  # of an observation's numbers, either way

_PACE, _TEMPER = 2.0, 3.0  # an action of 1: cuts e^2 times as fast; a rule weighs e^3 times as much
_USUAL = {"lamp": 4.0}
"""Log weights at the zero action, 0 for the others: LAMP is the best fixed rule (docs/methods.md)."""
_REGROWN = 0.3  # of a layer's kept weights, at most
_RATE = math.log(3.0)
_AT_ONCE = 0.95  # of what remains, at most, that the zero action cuts
_SOON = 1e-3  # of the plan: what remains is cut with the rest
_LOSS_FLOOR = 0.05  # of losses that are compared: below it they say little
_MOST = 0.999  # sparsity of a layer
_MARGINS = (0.05, 0.5)


@dataclass(frozen=True)
class Orders:
    """What an action says of the next slice.

    Attributes:
        fraction: of the plan's budget, to reach now, in [0, 1].
        weights: rule -> its share in the layers' sparsities; they sum to 1.
        regrow: share of each layer's kept weights that may be exchanged, in [0, 0.3].
        learning_rate: factor on every optimizer step of the slice, in [1/3, 3].
        distillation: factor on the settings' distillation weight, in [0, 2].
    """

    fraction: float
    weights: Mapping[str, float]
    regrow: float
    learning_rate: float
    distillation: float


def decode(action: Sequence[float], index: int, slices: int, fraction: float) -> Orders:
    """The orders of an action, numbers in [-1, 1] by `ACTION_NAMES`; 0 is a cubic, almost all by LAMP, nothing regrown.

    Args:
        action: one number a name.
        index: of the slice that begins, from 1.
        slices: of the training; the last one always meets the plan, and regrows nothing.
        fraction: of the plan's budget that is met so far.
    """
    given = dict(zip(ACTION_NAMES, action, strict=True))
    before, after = (scheduled(at, slices) for at in (index - 1, index))
    usual = min(_AT_ONCE, (after - before) / (1.0 - before)) if before < 1.0 else _AT_ONCE
    share = 1.0 - (1.0 - usual) ** math.exp(_PACE * given["cut"])
    reached = fraction + (1.0 - fraction) * share
    last = index >= slices
    weights = {rule: math.exp(_TEMPER * given[rule] + _USUAL.get(rule, 0.0)) for rule in RULES}
    total = sum(weights.values())
    return Orders(
        fraction=1.0 if last or 1.0 - reached < _SOON else reached,
        weights={rule: weight / total for rule, weight in weights.items()},
        regrow=0.0 if last else _REGROWN * max(0.0, given["regrow"]),
        learning_rate=math.exp(_RATE * given["learning_rate"]),
        distillation=1.0 + given["distillation"],
    )


def scheduled(index: int, slices: int) -> float:
    """The fraction of the plan that the zero action has met once slice `index`, from 1, has begun."""
    return rise(index / (END * slices))


def allocate(
    orders: Orders, layers: Layers, by_gradient: Layers | None, floors: Mapping[str, float]
) -> dict[str, float]:
    """Layer -> sparsity: the rules' mean by their weights, no layer below its floor, on the budget of the orders.

    Args:
        orders: how much to cut, and the rules' weights.
        layers: scored by the plan's criteria.
        by_gradient: the same, scored by gradients; None while none was seen, so that this rule has no say.
        floors: layer -> the least sparsity it may have now.

    Raises:
        ConfigError: a pattern of the plan has one sparsity alone.
    """
    mean = dict.fromkeys(layers.planned(1.0), 0.0)
    seen = {rule: weight for rule, weight in orders.weights.items() if rule != "gradient" or by_gradient is not None}
    for rule, weight in seen.items():
        scored = by_gradient if rule == "gradient" and by_gradient is not None else layers
        for name, share in _allocation(rule).sparsities(scored, orders.fraction).items():
            mean[name] += share * weight / sum(seen.values())

    def curve(at: float) -> dict[str, float]:
        """From the floors by way of the mean, at 1/2, to nothing kept."""
        up, down = max(0.0, 2.0 * at - 1.0), min(1.0, 2.0 * at)
        return {
            name: max(floors.get(name, 0.0), min(_MOST, share * down + (_MOST - share) * up))
            for name, share in mean.items()
        }

    return layers.meet(curve, orders.fraction)


@cache
def _allocation(rule: str) -> Allocation:
    return ALLOCATIONS.create(Choice(RULES[rule]))


def loss_ratio(loss: float, first: float) -> float:
    """Log of a loss over that of the dense model, both from a floor up."""
    return math.log((loss + _LOSS_FLOOR) / (first + _LOSS_FLOOR))


@dataclass(frozen=True)
class LayerState:
    """A layer as observations see it; ratios are of root mean squares.

    Attributes:
        spec: as the inventory knows it.
        mask: what is kept; None while all is.
        saliency: scores >= 0 in the weight's shape.
        gradient: mean absolute gradient of each weight, lately; None while none was seen.
    """

    spec: LayerSpec
    mask: Tensor | None
    saliency: Tensor
    gradient: Tensor | None

    @property
    def sparsity(self) -> float:
        return 0.0 if self.mask is None else sparsity(self.mask)

    def margin(self, quantile: float) -> float:
        """A quantile of the kept scores over their mean."""
        kept = (self.saliency if self.mask is None else self.saliency[self.mask]).flatten()
        at = kept.kthvalue(max(1, round(quantile * kept.numel()))).values
        return float(at / kept.mean().clamp(min=1e-30))

    @property
    def asked(self) -> float:
        """Log of the gradients of what is cut over those of what is kept; 0 where either is nothing."""
        if self.mask is None or self.gradient is None or bool(self.mask.all()):
            return 0.0
        cut, kept = (float(self.gradient[part].square().mean().sqrt()) for part in (~self.mask, self.mask))
        return math.log(cut / kept) if cut > 0.0 and kept > 0.0 else 0.0


def pooled(layers: Sequence[LayerState]) -> list[float]:
    """What observations see of all layers together, from ``margin at 5%`` on."""
    low, middle = ([layer.margin(at) for layer in layers] for at in _MARGINS)
    asked, sparsities = [layer.asked for layer in layers], [layer.sparsity for layer in layers]
    mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731 - a word, not a step
    spread = math.sqrt(mean([(each - mean(sparsities)) ** 2 for each in sparsities]))
    return [
        mean(low), min(low), mean(middle), mean(asked), max(asked), spread, max(sparsities), min(sparsities),
    ]  # fmt: skip
