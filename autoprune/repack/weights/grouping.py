"""Which filters share a group: those that keep the same positions, wherever in the layer they are.

Whoever pruned a model need not have grouped neighbours, so the order is found from the zeros. Filters with equal zeros
are found by sorting; of the others, each joins those that it adds the least to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

GROUP_SIZES = (16, 8, 4, 2, 1)  # the kernels' sizes
TOLERANCE = 0.05  # share of stray zeros stored as values rather than given up the larger group for
WORTH_MOVING = 0.97  # another order must store less than this share: neighbours are written faster
WORTH_SORTING = 0.92  # so must the first groups of similar filters, which are the best ones, for the rest to follow
PROBES = 8  # such groups
BUDGET = 10**8  # words of 64 positions compared in one search; larger weights are compared on some of their positions

Ints = NDArray[np.int32]
Indices = NDArray[np.int64]
Words = NDArray[np.uint64]


class Grouping:
    """The filters of one weight in groups, of any size. What was found is remembered.

    Args:
        weight: dense, ``(out, in / conv_groups, kh, kw)`` or ``(out, in)``, with its zeros.
        conv_groups: groups of a grouped convolution; no group of filters straddles them.
    """

    def __init__(self, weight: Tensor, conv_groups: int = 1) -> None:
        support = weight.detach().reshape(weight.shape[0], -1).numpy() != 0  # (out, columns)
        self.filters, self.positions = support.shape
        self.conv_groups = conv_groups
        packed = np.packbits(support, axis=1)
        padded = np.zeros((self.filters + 1, -(-self.positions // 64) * 8), np.uint8)  # row -1 stands for no filter
        padded[:-1, : packed.shape[1]] = packed
        self._bits: Words = padded.view(np.uint64)  # (out + 1, words)
        self._kept = _count(self._bits)  # (out + 1,)
        self._found: dict[int, Ints] = {}

    def rows(self, size: int) -> Ints:
        """The filter of each row, ``(groups, size)``; -1 where a group has fewer.

        In each group of the convolution, filters that are all zero come last. The others keep their order unless
        another one stores less.
        """
        if size not in self._found:
            self._found[size] = self._search(size)
        return self._found[size]

    def density(self, size: int) -> float:
        """What groups of `size` store, padding included, as a share of the weight."""
        return float(self._stored(self.rows(size)) / (self.filters * self.positions))

    def best_size(self) -> int:
        """The largest of GROUP_SIZES whose groups share their zeros, up to a few stray ones."""
        nonzeros = int(self._kept.sum())
        for size in GROUP_SIZES[:-1]:
            rows = self.rows(size)
            within = nonzeros + int(self._surplus(rows).sum()) <= nonzeros * (1 + TOLERANCE)
            if within and self._stored(rows) <= 1.5 * max(1, nonzeros):
                return size
        return 1

    def _search(self, size: int) -> Ints:
        neighbours, blocks = self._neighbours(size)
        surplus = self._surplus(neighbours)
        moved = neighbours.copy()
        for block in blocks:
            if surplus[block].any():
                filters = neighbours[block].ravel()
                moved[block] = self._alike(filters[filters >= 0], size)
        return moved if self._stored(moved) < WORTH_MOVING * self._stored(neighbours) else neighbours

    def _neighbours(self, size: int) -> tuple[Ints, list[slice]]:
        """Rows with every filter where it is, and which of them are one group of the convolution's live filters."""
        owner = np.arange(self.filters) // (self.filters // self.conv_groups)
        part = 2 * owner + (self._kept[:-1] == 0)  # live filters of the first group, dead ones, live ones of the next
        count = np.bincount(part, minlength=2 * self.conv_groups)
        groups = -(-count // size)
        first = np.cumsum(groups) - groups
        place = np.arange(self.filters) + np.repeat(first * size - (np.cumsum(count) - count), count)
        rows = np.full(int(groups.sum()) * size, -1, np.int32)
        rows[place] = np.argsort(part, kind="stable")
        live = [slice(start, start + many) for start, many in zip(first[::2], groups[::2], strict=True)]
        return rows.reshape(-1, size), live

    def _alike(self, live: Ints, size: int) -> Ints:
        """Groups of filters with equal zeros and of similar ones; filters in order in each, groups by their first."""
        whole, rest = (live[part] for part in _equal(self._bits[live], size))
        if self._surplus(_in_rows(rest, size)).any():
            rest = rest[_similar(self._bits[rest], size)]
        rows = np.concatenate([_in_rows(whole, size), _in_rows(rest, size)])
        rows = np.sort(np.where(rows < 0, self.filters, rows), axis=1)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return np.where(rows == self.filters, -1, rows).astype(np.int32)

    def _stored(self, rows: Ints) -> int:
        """Values stored, padding included."""
        positions = int(_count(_union(self._bits[rows])).sum())
        return positions * int(rows.shape[1])

    def _surplus(self, rows: Ints) -> Indices:
        """Zeros stored by each group, ``(groups,)``; padding does not count."""
        filled: Indices = _count(_union(self._bits[rows])) * (rows >= 0).sum(axis=1)
        surplus: Indices = filled - self._kept[rows].sum(axis=1)
        return surplus


def _count(bits: Words) -> Indices:
    """Positions kept, over the last axis."""
    count: Indices = np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)
    return count


def _union(bits: Words) -> Words:
    """What any filter of a group keeps: (groups, size, words) to (groups, words)."""
    union: Words = np.bitwise_or.reduce(bits, axis=1)
    return union


def _in_rows(filters: Ints | Indices, size: int) -> Ints:
    padded = np.full(-(-len(filters) // size) * size, -1, np.int32)
    padded[: len(filters)] = filters
    return padded.reshape(-1, size)


def _equal(bits: Words, size: int) -> tuple[Indices, Indices]:
    """Positions of filters that fill whole groups of equal ones, group after group, and of the others, in order."""
    rows = np.ascontiguousarray(bits).view(np.dtype((np.void, bits.shape[1] * 8))).ravel()
    _, kind = np.unique(rows, return_inverse=True)
    order = np.argsort(kind, kind="stable")
    kinds = kind[order]
    start = np.searchsorted(kinds, kinds)  # of each one's kind
    last = np.searchsorted(kinds, kinds, side="right")
    grouped = np.arange(len(order)) < start + (last - start) // size * size
    return order[grouped], np.sort(order[~grouped])


def _similar(bits: Words, size: int) -> Indices:
    """An order in which groups of `size` keep much the same; the order as it is when there seems to be none."""
    filters, words = bits.shape
    bits = bits[:, :: -(-words * filters**2 // (2 * BUDGET))]
    kept = _count(bits)
    by_size = np.argsort(-kept, kind="stable")  # those that keep most first: small ones fit in anywhere
    bits, kept = bits[by_size], kept[by_size]
    probes = [_gather(bits, kept, int(seed), size)[1] for seed in np.linspace(0, filters - 1, PROBES)]
    now = _count(_union(bits[_in_rows(np.argsort(by_size), size)])).mean()
    if np.mean(probes) > WORTH_SORTING * now:
        return np.arange(filters)
    left, order = np.arange(filters), []
    while len(left):
        group, _ = _gather(bits, kept, 0, size)
        order.append(left[group])
        left, bits, kept = np.delete(left, group), np.delete(bits, group, axis=0), np.delete(kept, group)
    return by_size[np.concatenate(order)]


def _gather(bits: Words, kept: Indices, seed: int, size: int) -> tuple[list[int], int]:
    """Up to `size` filters that join one after another, each storing the fewest zeros more; and what they keep."""
    group, union = [seed], bits[seed]
    free = np.ones(len(bits), np.bool_)
    free[seed] = False
    while len(group) < min(size, len(bits)):
        shared, wide = _count(bits & union), int(_count(union))
        cost = len(group) * (kept - shared) + (wide - shared)
        chosen = int(np.where(free, cost, np.iinfo(np.int64).max).argmin())
        group.append(chosen)
        free[chosen] = False
        union = union | bits[chosen]
    return group, int(_count(union))
