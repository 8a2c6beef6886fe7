"""Which channels share a lane: those that the same groups of filters keep, so that int8 layers read fewer lanes.

An int8 layer reads four neighbouring channels at once, at each tap where a group of its filters keeps any of them. The
channels between layers may be in any order, as long as those who write and who read them agree on it; a group of
filters of a writer stays together, for it shares what it reads. As in the channel permutations of Pool and Yu (2021),
channels trade places, two at a time, as long as that lowers what the readers cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoprune.repack.graph.channels import Channels
from autoprune.repack.graph.editor import Editor
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp, Op
from autoprune.repack.weights.grouping import Grouping
from autoprune.repack.weights.quads import MIXED_COST, QUAD, WHOLE, cost_of

SIZES = (16, 8, 4)  # filters in a group of an int8 layer
WORTH_REORDERING = 0.97  # what the layers that gain cost in another order must be less than this share
ROUNDS = 100  # of trades, at most; hardly ever more than 30 are needed
BUDGET = 2**28  # products in a round; readers of more are compared on some of what they keep
LEAST = 1e-6  # share of the cost that a trade must gain: less may be rounding

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Kept = NDArray[np.bool_]


def order_channels(graph: Graph) -> Graph:
    """The same function with its channels in an order in which int8 layers read fewer lanes.

    A bundle of channels (see `graph.bundles`) whose layers would gain less than 3% stays as it is.

    Args:
        graph: simplified, not yet quantised.
    """
    edited = Editor(graph)
    look = Channels(edited)
    closed = look.bundles.closed()
    roots = [root for root in dict.fromkeys(map(look.bundles.root, look.bundles.axes)) if root in closed]
    for trading in (False, True):  # groups of filters first, all of them: what a lane costs depends on its readers'
        for root in roots:
            if (order := _Bundle(look, root).better_order(trading)) is not None:
                look.select(root, torch.from_numpy(order))
    return edited.graph()


@dataclass(frozen=True)
class _Layer:
    """A layer at a bundle.

    Attributes:
        kept: ``(out, in, taps)``, of a flattened map with the features of a channel one after another.
        positions: how often it meets its weight.
        reads, writes: whether its inputs, its filters are the channels of the bundle.
        span: inputs that are one channel.
    """

    kept: Kept
    positions: int
    reads: bool
    writes: bool
    span: int

    def ordered(self, order: Indices) -> Kept:
        """What it keeps once the bundle has that order."""
        out, inputs, taps = self.kept.shape
        kept = self.kept[order] if self.writes else self.kept
        if not self.reads:
            return kept
        return kept.reshape(out, inputs // self.span, -1)[:, order].reshape(out, inputs, taps)

    def cost(self, order: Indices) -> float:
        """What it takes in that order, in cells of one filter."""
        return self._best(order)[0]

    def table(self, order: Indices) -> tuple[Kept, Floats]:
        """What groups of its filters keep of each channel, and what they take for it.

        Returns:
            ``(channels, cells)``; and ``(QUAD + 1, cells)``: what a cell takes by how many of its channels are kept.
        """
        _, size, whole = self._best(order)
        groups = -(-len(self.kept) // size)
        filters = np.zeros((groups * size, *self.kept.shape[1:]), np.bool_)
        filters[: len(self.kept)] = self.kept[order] if self.writes else self.kept
        cells = np.logical_or.reduce(filters.reshape(groups, size, *self.kept.shape[1:]), axis=1)  # (groups, in, taps)
        members = np.arange(QUAD + 1)
        cost = np.where(members >= whole, 1.0, MIXED_COST / QUAD * members) * (members > 0)
        kept: Kept = np.ascontiguousarray(cells.transpose(1, 0, 2)).reshape(cells.shape[1], -1)
        return kept, np.repeat((cost * size * self.positions)[:, None], kept.shape[1], axis=1).astype(np.float32)

    def _best(self, order: Indices) -> tuple[float, int, int]:
        """(cost, filters in a group, `whole`) of its best form."""
        kept = self.ordered(order)
        forms = [(size, whole) for size in SIZES for whole in WHOLE]
        costs = [self.positions * size * cost_of(kept, size, whole) for size, whole in forms]
        best = int(np.argmin(costs))  # the first of equals: larger groups load less for each filter
        return costs[best], *forms[best]


class _Bundle:
    """The layers at a bundle of channels, and the orders it may have."""

    def __init__(self, look: Channels, root: str) -> None:
        readers, writers = look.readers_of(root), look.writers_of(root)
        self.channels = len(look.bundles.axes[root].constant)
        self.layers = []
        for op in {each.output: each for each in (*writers, *readers)}.values():
            assert isinstance(op, LayerOp)
            reads = any(op is each for each in readers)
            span = look.bundles.axes[op.inputs[0]].span if reads else 1
            self.layers.append(
                _Layer(
                    kept=_support(look, op).reshape(*look.edited.weight(op, "weight").shape[:2], -1),
                    positions=op.positions(look.edited.shapes[op.output]),
                    reads=reads,
                    writes=any(op is each for each in writers),
                    span=span,
                )
            )
        self._written = [_support(look, op) for op in writers]

    def better_order(self, trading: bool) -> Indices | None:
        """The channels in an order that lowers what the layers cost by enough; None when there is none.

        Args:
            trading: whether channels trade places; else filters that share what they keep become neighbours.
        """
        gaining = [each for each in self.layers if (each.reads if trading else each.writes)]
        if self.channels <= QUAD or all(each.kept.all() for each in gaining):
            return None
        here = np.arange(self.channels)
        orders = [self._searched(*start) if trading else start[0] for start in self._starts(trading)]
        orders = [order for order in orders if not np.array_equal(order, here)]
        if not orders:
            return None
        before = sum(each.cost(here) for each in self.layers)
        worth = (1.0 - WORTH_REORDERING) * sum(each.cost(here) for each in gaining)
        after = [sum(each.cost(order) for each in self.layers) for order in orders]
        best = int(np.argmin(after))
        return orders[best] if before - after[best] > worth else None

    def _starts(self, trading: bool) -> list[tuple[Indices, Indices]]:
        """Orders to begin with, and which channels may trade places: those of equal labels, ``(channels,)``.

        Filters that share what they keep in all writers stay together. Where they share nothing, groups of several
        sizes are tried, and none.
        """
        if not self._written:
            return [(np.arange(self.channels), np.zeros(self.channels, np.int64))]
        support = np.concatenate(self._written, axis=1)
        grouping = Grouping(torch.from_numpy(support))
        own = grouping.best_size()
        sizes = (own,) if own >= QUAD else (*SIZES, 1) if trading else ()
        return [self._grouped(support, grouping.rows(size)) for size in sizes]

    def _grouped(self, support: Kept, rows: NDArray[np.int32]) -> tuple[Indices, Indices]:
        """The order of `rows`, ``(groups, size)``, and for each channel a number that equal groups have in common."""
        real, label = rows >= 0, np.zeros(self.channels, np.int64)
        if rows.shape[1] > 1:
            union = (support[rows] & real[..., None]).any(axis=1)
            _, alike = np.unique(np.packbits(union, axis=1), axis=0, return_inverse=True)
            label[rows[real]] = np.broadcast_to(alike.reshape(-1, 1), rows.shape)[real]
        return rows[real].astype(np.int64), label

    def _searched(self, order: Indices, label: Indices) -> Indices:
        """A better order, by trades within labels."""
        tables = [each.table(order) for each in self.layers if each.reads and each.span == 1]
        if not tables:
            return order
        kept = np.concatenate([table[0] for table in tables], axis=1)
        cost = np.concatenate([table[1] for table in tables], axis=1)
        order = order.copy()
        for one in np.unique(label):
            places = np.flatnonzero(label[order] == one)
            used = np.flatnonzero(kept[order[places]].any(axis=0))
            step = max(1, -(-(len(places) ** 2) * len(used) // BUDGET))
            trades = traded(kept[order[places]][:, used[::step]], cost[:, used[::step]], places // QUAD)
            order[places] = order[places][trades]
        return order


def _support(look: Channels, op: Op) -> Kept:
    """``(filters, columns)``: what a layer keeps."""
    kept: Kept = look.edited.weight(op, "weight").flatten(1).numpy() != 0
    return kept


def traded(kept: Kept, cost: Floats, lane: Indices) -> Indices:
    """Lets channels trade places, each time all of the best trades that do not touch each other's lanes.

    What a lane costs is affine in what is kept of one of its channels, the others staying: one product of matrices
    tells what each channel would cost in each place.

    Args:
        kept: ``(channels, cells)``, of the channel in each place.
        cost: ``(QUAD + 1, cells)``; of a cell in a lane, by how many channels are kept of it.
        lane: ``(channels,)``, rising: of each place.

    Returns:
        The channel for each place; the same every time for the same arguments.
    """
    order, places, cells = np.arange(len(kept)), np.arange(len(kept)), np.arange(kept.shape[1])
    _, first, lane = np.unique(lane, return_index=True, return_inverse=True)
    together, more = lane[:, None] == lane, np.diff(cost, axis=0)
    for _ in range(ROUNDS):
        here = kept[order]
        members = np.add.reduceat(here.view(np.int8), first, axis=0)  # (lanes, cells)
        now, before = more[np.minimum(members, QUAD - 1), cells], more[np.maximum(members, 1) - 1, cells]
        slope = np.where(here, before[lane], now[lane])  # (places, cells): what keeping it adds, that place left out
        there = slope @ here.T.astype(np.float32)  # (places, channels): what a channel adds in a place
        own = there.diagonal()
        gain = own[:, None] + own - there - there.T
        gain[together] = 0.0
        partner = gain.argmax(axis=1)
        if not _swap_(order, partner, gain[places, partner], lane, LEAST * float(cost[members, cells].sum())):
            break
    return order


def _swap_(order: Indices, partner: Indices, gain: Floats, lane: Indices, least: float) -> bool:
    """Makes the best trades of lanes that no better one has touched; whether there were any."""
    touched = np.zeros(int(lane[-1]) + 1, np.bool_)
    for one in np.argsort(-gain, kind="stable"):
        other = partner[one]
        if gain[one] <= least:
            break
        if not (touched[lane[one]] or touched[lane[other]]):
            order[[one, other]] = order[[other, one]]
            touched[lane[[one, other]]] = True
    return bool(touched.any())
