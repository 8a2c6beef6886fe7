"""Which filters should share a group, so that groups keep the most saliency.

Filters trade places, two at a time, where that keeps more, as in the channel permutations of Pool and Yu (2021). With
``a`` the saliencies less the level under which cells are cut, what is kept above that level is the sum of ``relu(A)``,
``A`` being the sum of ``a`` over a group's filters. This is convex in ``A``, so its slope never promises more than a
trade gives; the trades it promises most for are worked out.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SWEEPS = 4  # times that every filter is offered a trade; the level is taken anew each time
OFFERS = 8  # trades worked out for each
BUDGET = 512 * 512 * 4608  # filters x filters x columns in a sweep; larger layers are compared on some of their columns
LEAST = 1e-6  # share of what is kept that a trade must gain: less may be rounding

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def trade_places(saliency: Tensor, group: Tensor, kind: Tensor, sparsity: float) -> Tensor:
    """Improves which group each filter is in; the groups keep their sizes.

    Args:
        saliency: ``(out, columns)``, of each filter's weights.
        group: ``(out,)`` int64, from 0.
        kind: ``(out,)``; only filters of the same kind trade.
        sparsity: fraction of the layer's cells that will be cut, in [0, 1).

    Returns:
        The group of each filter, ``(out,)``. The same every time for the same arguments.
    """
    step = -(-saliency.numel() * len(saliency) // BUDGET)
    rows = saliency[:, ::step].numpy()
    rows = (rows / max(float(np.maximum(rows, 0).mean()), np.finfo(np.float32).tiny)).astype(np.float32)
    table = _Table(group.numpy().copy(), kind.numpy())
    for _ in range(SWEEPS):
        table.level(rows, sparsity)
        trades = sum(table.trade(one) for one in range(len(rows)))
        if trades == 0:
            break
    return torch.from_numpy(table.group)


class _Table:
    """Who is in which group, and what a move is worth, while filters trade."""

    def __init__(self, group: Indices, kind: Indices) -> None:
        self.group, self.kind = group, kind
        self.filters = np.arange(len(group))

    def level(self, rows: Floats, sparsity: float) -> None:
        """Takes the level at which cells are cut now, and all that follows from it."""
        size = np.bincount(self.group)
        member = (self.group == np.arange(len(size))[:, None]).astype(np.float32)  # (groups, out)
        total = member @ rows  # (groups, columns)
        self.a = rows - _level(total / size[:, None], size, sparsity)
        self.a_by_column = np.ascontiguousarray(self.a.T)
        self.total: Floats = member @ self.a
        self.worth = np.maximum(self.total, 0).sum(axis=1)  # (groups,)
        self.slope = (self.total > 0).astype(np.float32) @ self.a_by_column  # (groups, out): a filter's worth in each
        self.here = self.slope[self.group, self.filters]  # (out,): where it is

    def trade(self, one: int) -> bool:
        """Lets one filter change places with the one that gains most by it; whether there is any."""
        own = self.group[one]
        promise = self.slope[own] - self.here + self.slope[:, one][self.group]
        promise[(self.kind != self.kind[one]) | (self.group == own)] = -np.inf
        offers = np.argpartition(-promise, min(OFFERS, len(promise)) - 1)[:OFFERS]
        offers = offers[promise[offers] > -np.inf]
        if not len(offers):
            return False
        change = self.a[offers] - self.a[one]  # (offers, columns)
        theirs = self.group[offers]
        after = np.maximum(self.total[own] + change, 0).sum(axis=1)
        after += np.maximum(self.total[theirs] - change, 0).sum(axis=1)
        gain = after - self.worth[theirs] - self.worth[own]
        best = int(gain.argmax())
        if gain[best] <= LEAST * self.worth.sum():
            return False
        self.group[one], self.group[offers[best]] = theirs[best], own
        self._change(own, change[best])
        self._change(theirs[best], -change[best])
        return True

    def _change(self, group: int, change: Floats) -> None:
        """Adds to a group's sum."""
        before = self.total[group] > 0
        self.total[group] += change
        now = self.total[group] > 0
        self.worth[group] = np.maximum(self.total[group], 0).sum()
        turned = np.flatnonzero(now != before)
        self.slope[group] += np.where(now[turned], np.float32(1), np.float32(-1)) @ self.a_by_column[turned]
        members = np.flatnonzero(self.group == group)
        self.here[members] = self.slope[group, members]


def _level(mean: Floats, size: Indices, sparsity: float) -> float:
    """The saliency of the best cell that is cut, given each cell's (groups, columns) and the groups' sizes."""
    order = np.argsort(-mean, axis=None, kind="stable")
    weights = np.cumsum(np.repeat(size, mean.shape[1])[order])
    last = int(np.searchsorted(weights, round((1.0 - sparsity) * int(weights[-1])), side="right"))
    return float(mean.ravel()[order[min(last, len(order) - 1)]])
