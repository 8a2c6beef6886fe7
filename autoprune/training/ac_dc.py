"""AC/DC: sparse and dense phases take turns; the last one is sparse (Peste et al. 2021).

A sparse phase keeps the cells that score highest as it begins, and trains these alone. In the dense phase after it all
weights train, those that were cut from zero, so that the next sparse phase may keep others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autoprune.allocation import make_allocation
from autoprune.checks import check_counts
from autoprune.training.latent import LatentTraining
from autoprune.training.schedule import check_span, cutting_steps


class AcDc(LatentTraining):
    """Trains densely, then in `rounds` sparse and as many dense phases of one length, then sparsely to the end.

    The defaults are the paper's share of a run: 10 of 100 epochs dense, then phases of about 5, then 15 sparse.

    Args:
        begin: fraction of the run after which the first sparse phase begins, in [0, 1).
        end: fraction of the run after which the last sparse phase begins, in (begin, 1].
        rounds: sparse phases between the two, each with a dense one after it, >= 1.
        allocation: what shares the plan's budget among the layers: a name, or a table with its arguments.
    """

    strength_range = ("end", 0.5, 0.95)

    def __init__(
        self,
        begin: float = 0.1,
        end: float = 0.85,
        rounds: int = 7,
        allocation: str | Mapping[str, Any] = "planned",
    ) -> None:
        check_span("ac_dc", begin, end)
        check_counts("training method 'ac_dc'", {"rounds": rounds})
        self.begin, self.end, self.rounds = begin, end, rounds
        self.allocation = make_allocation(allocation)
        self.finds_shares = self.allocation.finds_shares

    def prepare(self) -> None:
        self._phases = phases(self.begin, self.end, self.rounds, self.total_steps)

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        return gradient * self.masks[name] if name in self.masks else gradient

    def update(self, step: int) -> None:
        self.restart_()  # momentum moved what is cut
        sparse = self._phases.get(step, bool(self.masks))
        if sparse and not self.masks:
            self.set_masks(self.pruner.masks(allocation=self.allocation))
            self.restart_()
        elif not sparse:
            self.set_masks({})


def phases(begin: float, end: float, rounds: int, total_steps: int) -> dict[int, bool]:
    """The steps after which a phase begins -> whether it is sparse; the last one is, and the run begins densely.

    Args:
        begin: fraction of the run after which the first sparse phase begins, in [0, 1).
        end: fraction of the run after which the last sparse phase begins, in (begin, 1].
        rounds: sparse phases between the two, >= 1. Of those too short for a step, what they lead to is left.
        total_steps: of the run.
    """
    first, last = cutting_steps(begin, end, total_steps)
    marks = [first + (last - first) * index // (2 * rounds) for index in range(2 * rounds + 1)]
    return {max(1, step): index % 2 == 0 for index, step in enumerate(marks)}
