"""Steered: at every slice of the training a policy says how much is cut, where, and how fast the rest learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from autoprune.allocation import Layers, WeightCost
from autoprune.checks import check_counts
from autoprune.errors import AutopruneError, ConfigError, NumericalError
from autoprune.masks import cut_layers
from autoprune.model.arguments import call_with
from autoprune.model.given import called, read_calibration
from autoprune.model.inventory import eval_mode
from autoprune.patterns import PATTERNS
from autoprune.patterns.base import cell_means
from autoprune.patterns.layered import cells_within
from autoprune.training.base import Pruner, Signals
from autoprune.training.latent import LatentTraining
from autoprune.training.steering import (
    ACTION_NAMES,
    LIMIT,
    OBSERVATION_NAMES,
    SLICES,
    LayerState,
    Orders,
    allocate,
    decode,
    loss_ratio,
    pooled,
    scheduled,
)
from autoprune.training.steering_policy import MOST_SLICES, SteeringPolicy

MEMORY = 0.9  # of the moving average of gradients


@dataclass
class _Course:
    """How far a steered training has come; numbers alone, so that they can be kept.

    Attributes:
        slices: that have begun.
        fraction: of the plan's budget that is met.
        first: loss of the dense model on the calibration batches; NaN before it was seen.
        calibration, training: losses at the last look; the training's is the mean of a slice.
        summed, counted: of the training losses since then.
        drift, regrowth: share of the planned weights that the last cut took away and gave back.
        learning_rate, distillation: of the present slice.
        gradients: optimizer steps whose gradients were seen.
    """

    slices: float = 0.0
    fraction: float = 0.0
    first: float = math.nan
    calibration: float = math.nan
    training: float = math.nan
    summed: float = 0.0
    counted: float = 0.0
    drift: float = 0.0
    regrowth: float = 0.0
    learning_rate: float = 1.0
    distillation: float = 1.0
    gradients: float = 0.0


class Steered(LatentTraining):
    """A policy reads the training now and then and orders the next slice; the last slice meets the plan's budget.

    An order says how much of what remains is cut now, how the cut is shared among the layers (a mean of uniform, ERK,
    LAMP and a global ranking by gradients), how many weights may be exchanged for those with the largest gradients,
    and a factor each on the learning rate and on the distillation. The factor scales every optimizer step, which for
    SGD and AdamW is a factor on the learning rate, whoever has the optimizer. What is exchanged comes back as good as
    at zero.

    Args:
        path: folder of a steering policy, as `autoprune train configs/steering.toml` makes one; without it the zero
            action is taken throughout: a cubic, almost all by LAMP.
        slices: of the training, from 1 to 1000; the policy's own when left out, else 30. A shorter training has as
            many as it has steps.
    """

    finds_shares = True

    def __init__(self, path: str | None = None, slices: int | None = None) -> None:
        if path is not None and not isinstance(path, str):
            raise ConfigError(f"training method 'steered': path is the folder of a steering policy, not {path!r:.60}.")
        self.policy = None if path is None else SteeringPolicy.load(Path(path))
        if slices is not None:
            check_counts("training method 'steered'", {"slices": slices}, most=MOST_SLICES)
        self.wanted = slices or (SLICES if self.policy is None else self.policy.slices)

    def prepare(self) -> None:
        self.slices = min(self.wanted, self.total_steps)
        self.turns = {math.ceil(index * self.total_steps / self.slices) for index in range(1, self.slices)}
        self.course = _Course()
        self.previous = [0.0] * len(ACTION_NAMES)
        self.gradients = {name: torch.zeros_like(latent) for name, latent in self.latent.items()}
        self._before: list[tuple[Tensor, Tensor]] = []
        self.distillation_factor = 1.0
        self.turn()

    def turn(self) -> None:
        """Called where a slice begins: at the start, and after the last step of each slice but the last."""
        zero = [0.0] * len(ACTION_NAMES)
        self.steer(zero if self.policy is None else self.policy(self.observe()))

    def see_loss(self, value: float) -> None:
        self.course.summed += value
        self.course.counted += 1

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        self.gradients[name].lerp_(gradient.abs(), 1.0 - MEMORY)
        return gradient * self.masks[name] if name in self.masks else gradient

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.course.gradients += 1
        if self.course.learning_rate != 1.0:
            moved = (p for p in self.pruner.model.parameters() if p.requires_grad)
            self._before = [(parameter, parameter.detach().clone()) for parameter in moved]

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            for parameter, before in self._before:
                parameter.copy_(before + self.course.learning_rate * (parameter - before))
        self._before = []
        super().after_step(step)
        if step in self.turns:
            self.turn()

    def update(self, step: int) -> None:
        """Nothing changes between two turns."""

    def steer(self, action: Sequence[float]) -> Orders:
        """Begins the next slice by an action, numbers in [-1, 1] by `steering.ACTION_NAMES`; cuts now.

        Raises:
            ConfigError: a pattern of the plan has one sparsity alone.
        """
        course = self.course
        orders = decode(action, int(course.slices) + 1, self.slices, course.fraction)
        course.slices += 1
        course.learning_rate, course.distillation = orders.learning_rate, orders.distillation
        self.distillation_factor = orders.distillation
        self.previous = [float(each) for each in action]
        if orders.fraction > course.fraction or orders.regrow > 0.0:
            self._cut(orders)
        else:
            course.drift = course.regrowth = 0.0
        course.fraction = orders.fraction
        return orders

    def _cut(self, orders: Orders) -> None:
        """Makes new masks, on the orders' budget."""
        self.restart_()
        scores, pruner = self.pruner.saliency(), self.pruner
        if not scores:
            return
        exchanged = {name: self._exchanged(name, orders.regrow) for name in scores}
        floors = {name: float((~mask & ~exchanged[name]).sum()) / mask.numel() for name, mask in self.masks.items()}
        shares = allocate(orders, self._layers(scores), self._by_gradient(), floors)
        ranked = {name: self._ranked(name, score, exchanged[name]) for name, score in scores.items()}
        within = self.masks if orders.regrow == 0.0 else None
        final = {name: max(share, pruner.layers[name].sparsity) for name, share in shares.items()}
        before = self.masks
        masks = cut_layers(ranked, pruner.inventory, pruner.plan, shares, within, final)
        whole = {name: torch.ones_like(latent, dtype=torch.bool) for name, latent in self.latent.items()}
        self.set_masks({**whole, **masks})  # one of each layer: what is given back counts too
        self.course.drift, self.course.regrowth = changes(before, self.masks, self.latent)
        self._show_effective_()

    def _layers(self, scores: Mapping[str, Tensor]) -> Layers:
        """What competes: negative where it is cut."""
        pruner = self.pruner
        ranked = {n: s.masked_fill(~self.masks[n], -1.0) if n in self.masks else s for n, s in scores.items()}
        return Layers(pruner.inventory, pruner.plan, ranked, pruner.cost or WeightCost(pruner.inventory))

    def _by_gradient(self) -> Layers | None:
        if not self.course.gradients:
            return None
        return self._layers({name: latent.abs() * self.gradients[name] for name, latent in self.latent.items()})

    def _exchanged(self, name: str, regrow: float) -> Tensor:
        """The weights that come back: of those that are cut, the cells with the largest gradients; bool."""
        mask = self.masks.get(name)
        if mask is None or regrow == 0.0:
            return torch.zeros_like(self.latent[name], dtype=torch.bool)
        pattern = PATTERNS.create(self.pruner.layers[name].pattern)
        cells = cells_within(pattern, self.pruner.inventory[name], self.latent[name].abs(), mask)
        asked, weights = cell_means(self.gradients[name], cells)
        alive = cell_means(mask.double(), cells)[0] > 0.5
        order = torch.where(alive, -1.0, asked).argsort(descending=True, stable=True)
        back = torch.zeros_like(alive)
        back[order] = weights[order].cumsum(0) <= regrow * int(mask.sum())
        return (back & ~alive)[cells]

    def _ranked(self, name: str, score: Tensor, exchanged: Tensor) -> Tensor:
        """Scores that keep what comes back, then what is there by its score; nothing else comes before these."""
        if name not in self.masks:
            return score
        kept = 2.0 + score / score.max().clamp(min=1e-30)
        asked = self.gradients[name] / self.gradients[name].max().clamp(min=1e-30)
        return torch.where(exchanged, 4.0, torch.where(self.masks[name], kept, asked))

    def observe(self) -> list[float]:
        """What a policy sees where a slice begins, by `steering.OBSERVATION_NAMES`; to be called once there.

        Raises:
            AutopruneError: there are no calibration batches.
            NumericalError: the loss on them is not finite.
        """
        course, pruner = self.course, self.pruner
        calibration = calibration_loss(self.pruner)
        training = course.summed / course.counted if course.counted else calibration
        if math.isnan(course.first):
            course.first = course.calibration = course.training = calibration
        scores, sizes = pruner.saliency(), {name: pruner.inventory[name].weights for name in pruner.layers}
        states = [
            LayerState(
                pruner.inventory[name], self.masks.get(name), score, self.gradients[name] if course.gradients else None
            )
            for name, score in scores.items()
        ]
        planned = sum(size * pruner.layers[name].sparsity for name, size in sizes.items()) / max(1, sum(sizes.values()))
        done = course.slices / self.slices
        seen = [
            done, 1.0 - course.fraction, course.fraction - scheduled(int(course.slices), self.slices),
            -math.log10(max(1e-6, 1.0 - planned)), math.log10(max(1, len(states))),
            loss_ratio(calibration, course.first), loss_ratio(calibration, course.calibration),
            loss_ratio(training, course.first), loss_ratio(training, course.training),
            course.drift, course.regrowth, *(pooled(states) if states else [0.0] * 8), *self.previous,
        ]  # fmt: skip
        course.calibration, course.training = calibration, training
        course.summed = course.counted = 0.0
        assert len(seen) == len(OBSERVATION_NAMES)
        return [max(-LIMIT, min(LIMIT, value)) for value in seen]

    def signals(self) -> Signals:
        signals = super().signals()
        shown = {
            "steering/fraction": self.course.fraction,
            "steering/learning_rate": self.course.learning_rate,
            "steering/distillation": self.course.distillation,
            **{f"steering/action {name}": value for name, value in zip(ACTION_NAMES, self.previous, strict=True)},
        }
        return replace(signals, scalars={**signals.scalars, **shown})

    def state(self) -> dict[str, Tensor]:
        numbers = {
            "steering.course": torch.tensor(list(asdict(self.course).values()), dtype=torch.float64),
            "steering.previous": torch.tensor(self.previous, dtype=torch.float64),
        }
        return super().state() | numbers | {f"gradient.{name}": value for name, value in self.gradients.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        numbers = [float(value) for value in state["steering.course"]]
        self.course = _Course(**dict(zip([each.name for each in fields(_Course)], numbers, strict=True)))
        self.previous = [float(value) for value in state["steering.previous"]]
        self.distillation_factor = self.course.distillation
        for name, value in self.gradients.items():
            value.copy_(state[f"gradient.{name}"])
        super().load_state(state)


def changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], planned: Mapping[str, Tensor]
) -> tuple[float, float]:
    """What new masks take away and give back, as shares of the weights of the planned layers."""
    total = max(1, sum(weight.numel() for weight in planned.values()))
    taken = given = 0
    for name, mask in after.items():
        old = before.get(name, torch.ones_like(mask))
        taken += int((old & ~mask).sum())
        given += int((mask & ~old).sum())
    return taken / total, given / total


def calibration_loss(pruner: Pruner) -> float:
    """The mean loss on the calibration batches, in eval mode.

    Raises:
        AutopruneError: there are none.
        NumericalError: it is not finite.
    """
    model, total, count = pruner.model, 0.0, 0
    with eval_mode(model), torch.no_grad():
        for count, inputs, target in read_calibration(pruner.batches):
            with called(f"the model does not run on batch {count} of the calibration data"):
                total += float(pruner.loss(call_with(model, inputs), target))
    if count == 0:
        raise AutopruneError(
            "a steering policy reads the loss on calibration batches, and there are none: give some (batches=), or "
            "leave out the policy's path."
        )
    if not math.isfinite(total):
        raise NumericalError(
            f"training diverged: the loss on the calibration batches is {total / count}. Lower learning_rate."
        )
    return total / count
