"""Iterative pruning with Bayesian estimation: what is cut is what was found redundant again and again.

Each weight has a Beta posterior over the probability that its cell ranks below the cut: every look at the model, on a
resampled part of the calibration batches and with the weights where SGD's noise left them, is one Bernoulli trial.
Earlier rounds' trials count too, the less the older they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.allocation.threshold import Global, Threshold
from autoprune.checks import check_counts, check_flags, check_numbers
from autoprune.criteria import CRITERIA
from autoprune.errors import ConfigError, did_you_mean
from autoprune.masks import Masks, criteria_needs
from autoprune.registry import Choice
from autoprune.training.base import Pruner, Signals, SparseTraining
from autoprune.training.schedule import check_span, cutting_steps, rise

PRIOR = 0.5  # both counts of Jeffreys' prior
TIE = 1e-3  # probabilities that differ by less are as good as equal
SCHEDULES = ("cubic", "geometric")
PARTS = ("masks", "next", "gates", "redundant", "score", "predicted")  # of the state, layer -> tensor


@dataclass(frozen=True)
class Round:
    """One cut.

    Attributes:
        decided: step after which the cut is decided, 0 before the first.
        done: step after which what it cuts is zero.
        fraction: of the plan's sparsities that it reaches.
    """

    decided: int
    done: int
    fraction: float


@dataclass(frozen=True)
class CutSchedule:
    """When a run looks at its weights and when it cuts.

    Attributes:
        rounds: by the step they are decided after; of several at one step, the last.
        looks: step -> looks after it.
    """

    rounds: Mapping[int, Round]
    looks: Counter[int]

    @classmethod
    def between(
        cls, first: int, last: int, count: int, fade: float, draws: int, fraction: Callable[[float], float]
    ) -> CutSchedule:
        """`count` rounds from step `first` to `last`, with `draws` looks before each.

        Args:
            first: step after which the first cut is decided.
            last: step after which the last one is done.
            count: rounds, >= 1.
            fade: share of a round over which what it cuts fades out, in [0, 1].
            draws: looks, spread over the steps since the round before was done.
            fraction: of the plan's sparsities, at a progress in (0, 1] through the rounds.
        """
        bounds = [first + math.ceil((last - first) * i / count) for i in range(count + 1)]
        rounds: dict[int, Round] = {}
        for index, (decided, until) in enumerate(pairwise(bounds), start=1):
            done = decided + math.floor((until - decided) * fade)
            rounds[decided] = Round(decided, done, fraction(index / count))
        looks: Counter[int] = Counter()
        rested = max(0, first - (bounds[1] - first))
        for decided, cut in rounds.items():
            span = decided - rested
            looks.update(rested + math.ceil(span * i / draws) for i in range(1, draws + 1))
            rested = cut.done
        return cls(rounds, looks)

    def coming(self, step: int) -> Round:
        """The first round that is decided at `step` or later."""
        return min((cut for at, cut in self.rounds.items() if at >= step), key=lambda cut: cut.decided)

    def fading(self, step: int) -> list[Round]:
        """The rounds whose cut fades out in `step`."""
        return [cut for cut in self.rounds.values() if cut.decided < step <= cut.done]


class Bayesian(SparseTraining):
    """Cuts, round after round, the cells most probably redundant, and lets them fade out.

    Over the steps of a round the weights are scaled from 1 to their expected gate, the probability that they are *not*
    redundant, and from there to 0 or 1. The scale is folded into the weights, so nothing of it is left in the end.

    Args:
        rounds: cuts, >= 1, evenly spaced.
        begin: fraction of the run after which the first cut is decided, in [0, 1).
        end: fraction of the run at which the last one is done, in (begin, 1].
        schedule: ``cubic`` (Zhu and Gupta 2017) or ``geometric`` (each round keeps the same share of what is left).
        draws: looks at the model in a round, >= 1.
        batches: calibration batches that a look resamples, >= 1; none are read where the criterion needs none.
        forget: what an earlier round's trials count in the next one, in [0, 1]; 0 remembers nothing.
        fade: share of a round over which what it cuts fades out, in [0, 1]; 0 cuts at once.
        memory: false compares with memory-less iterative pruning: `forget` and `fade` are taken as 0.
        criterion: name of the criterion the looks score by; each layer's own when left out.
        allocation: what shares the budget of a round among the layers: a name, or a table with its arguments.
    """

    strength_range = ("forget", 0.0, 1.0)
    passing = ("predicted/",)

    def __init__(
        self,
        rounds: int = 8,
        begin: float = 0.0,
        end: float = 0.6,
        schedule: str = "cubic",
        draws: int = 8,
        batches: int = 1,
        forget: float = 0.5,
        fade: float = 0.5,
        memory: bool = True,
        criterion: str | None = None,
        allocation: str | Mapping[str, Any] = "planned",
    ) -> None:
        check_span("bayesian", begin, end)
        check_counts("training method 'bayesian'", {"rounds": rounds, "draws": draws, "batches": batches})
        check_numbers("training method 'bayesian'", {"forget": forget, "fade": fade}, 0.0, 1.0)
        if schedule not in SCHEDULES:
            raise ConfigError(f"training method 'bayesian': unknown schedule. {did_you_mean(str(schedule), SCHEDULES)}")
        check_flags("training method 'bayesian'", {"memory": memory})
        self.rounds, self.begin, self.end, self.schedule = rounds, begin, end, schedule
        self.draws, self.batches = draws, batches
        self.forget, self.fade = (forget, fade) if memory else (0.0, 0.0)
        self.criterion = Choice(criterion) if criterion is not None else None
        if self.criterion is not None:
            CRITERIA.create(self.criterion)  # raises on a name that is none
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner, self.masks = pruner, {}
        first, last = cutting_steps(self.begin, self.end, total_steps)
        self._schedule = CutSchedule.between(first, last, self.rounds, self.fade, self.draws, self._fraction)
        zeros = {name: torch.zeros_like(pruner.weight(name)).detach() for name in pruner.layers}
        self.trials = torch.zeros(())
        self.redundant = zeros  # layer -> trials in which the weight ranked below the cut
        self.score = {name: value.clone() for name, value in zeros.items()}  # summed over trials
        self.gates: dict[str, Tensor] = {}  # expected ones of the last round
        self.next: Masks = {}  # what it leaves
        self.predicted: dict[str, Tensor] = {}  # each round's guess of the final mask, (rounds, *weight)
        self._batches = list(pruner.batches)
        self._looker = pruner
        if self.criterion is not None:
            layers = {name: replace(layer, criterion=self.criterion) for name, layer in pruner.plan.layers.items()}
            self._looker = replace(pruner, plan=replace(pruner.plan, layers=layers))
        self._advance(0)

    def after_step(self, step: int) -> None:
        self.pruner.apply_(self.masks)
        self._fade_(step)
        self._advance(step)

    def _fraction(self, progress: float) -> float:
        """Of the plan's sparsities, at `progress` in (0, 1] through the rounds."""
        if self.schedule == "cubic":
            return rise(progress)
        weights = {name: self.pruner.inventory[name].weights for name in self.pruner.layers}
        cut = sum(weights[name] * layer.sparsity for name, layer in self.pruner.layers.items())
        overall = cut / max(1, sum(weights.values()))
        return (1.0 - (1.0 - overall) ** progress) / overall if overall and progress < 1.0 else 1.0

    def _advance(self, step: int) -> None:
        """Looks and cuts, as far as this step has any."""
        for _ in range(self._schedule.looks[step]):
            self._look(self._schedule.coming(step).fraction)
        if step in self._schedule.rounds:
            self._decide_(self._schedule.rounds[step])

    def _look(self, fraction: float) -> None:
        """One trial of every weight, on batches drawn with replacement."""
        looker = self._looker
        if criteria_needs(looker.plan):
            drawn = torch.randint(len(self._batches), (self.batches,)).tolist() if self._batches else []
            looker = replace(looker, batches=[self._batches[i] for i in drawn])
        saliency = looker.saliency()
        masks = self.pruner.masks(fraction, within=self.masks, saliency=saliency, allocation=self.allocation)
        self.trials += 1
        for name, score in saliency.items():
            self.score[name] += score / score.mean().clamp(min=1e-30)
            if name in masks:
                self.redundant[name] += ~masks[name]

    @property
    def decisions(self) -> list[int]:
        """The steps after which the rounds' cuts are decided, in order; 0 is before the first step."""
        return sorted(self._schedule.rounds)

    def probability(self, name: str) -> Tensor:
        """The predictive probability that each weight's cell is redundant, in (0, 1), in the weight's shape."""
        return (self.redundant[name] + PRIOR) / (self.trials + 2 * PRIOR)

    def _decide_(self, cut: Round) -> None:
        keeps = {name: 1.0 - self.probability(name) for name in self.redundant}
        highest = max((float(score.max()) for score in self.score.values()), default=0.0) or 1.0
        # among equally probable cells, those that scored lowest go first
        rank = {name: keep.double() + TIE * self.score[name].double() / highest for name, keep in keeps.items()}
        chosen = self.allocation
        if isinstance(chosen, Threshold):  # the trials were ranked its way; their probabilities compare as they are
            chosen = Global(most=chosen.most)
        self.next = self.pruner.masks(cut.fraction, within=self.masks, saliency=rank, allocation=chosen)
        self._predict(self.pruner.masks(within=self.masks, saliency=rank, allocation=chosen))
        self.gates = keeps
        self.trials = self.trials * self.forget
        for name in keeps:
            self.redundant[name] *= self.forget
            self.score[name] *= self.forget
        if cut.done == cut.decided:
            self._settle_()

    def _predict(self, masks: Masks) -> None:
        for name, weight in self.redundant.items():
            guess = masks.get(name, torch.ones_like(weight, dtype=torch.bool))[None]
            self.predicted[name] = torch.cat([self.predicted.get(name, guess[:0]), guess])

    def _settle_(self) -> None:
        self.masks = dict(self.next)
        self.pruner.apply_(self.masks)

    def _fade_(self, step: int) -> None:
        """Moves the scale of the weights on by one step of the round in progress, if one is."""
        for cut in self._schedule.fading(step):
            span = cut.done - cut.decided
            now, before = (step - cut.decided) / span, (step - 1 - cut.decided) / span
            with torch.no_grad():
                for name in self.gates:
                    self.pruner.weight(name).mul_(self._scale(name, now) / self._scale(name, before))
            if step == cut.done:
                self._settle_()

    def _scale(self, name: str, progress: float) -> Tensor:
        """What the weights are scaled by, at `progress` in [0, 1] through the fading: 1, expected gate, 0 or 1."""
        expected = self.gates[name]
        if progress <= 0.5:
            return 1.0 - 2.0 * progress * (1.0 - expected)
        final = self.next[name].float() if name in self.next else torch.ones_like(expected)
        return expected + (2.0 * progress - 1.0) * (final - expected)

    def agreement(self) -> list[float]:
        """Of the weights that the last round expects to keep in the end, the share each round expected to."""
        if not self.predicted:
            return []
        kept = sum(int(guess[-1].sum()) for guess in self.predicted.values())
        rounds = len(next(iter(self.predicted.values())))
        both = [sum(int((guess[i] & guess[-1]).sum()) for guess in self.predicted.values()) for i in range(rounds)]
        return [value / max(1, kept) for value in both]

    def signals(self) -> Signals:
        signals = super().signals()
        scalars = {f"agreement/round_{i}": value for i, value in enumerate(self.agreement(), start=1)}
        alive = [self.gates[name][self.masks[name]] if name in self.masks else self.gates[name] for name in self.gates]
        gates = torch.cat([gate.flatten() for gate in alive]) if alive else torch.zeros(0)
        if not len(gates):
            return replace(signals, scalars={**signals.scalars, **scalars})
        scalars["redundancy"] = 1.0 - float(gates.mean())
        return Signals({**signals.scalars, **scalars}, {**signals.histograms, "expected_gate": gates})

    def state(self) -> dict[str, Tensor]:
        parts = {part: getattr(self, part) for part in PARTS}
        named = {f"{part}/{name}": value.clone() for part, values in parts.items() for name, value in values.items()}
        return named | {"trials": self.trials}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.trials = state["trials"]
        for part in PARTS:
            values = {n.removeprefix(f"{part}/"): v.clone() for n, v in state.items() if n.startswith(f"{part}/")}
            setattr(self, part, values)
