"""Group-wise: `size` filters share their kept positions (after 1xN, Lin et al. 2022).

They are neighbours, or with `permute` any that are alike (after TETRIS, Ji et al. 2018): a repacked layer carries the
order and undoes it in its output. With a `block` they keep whole blocks of neighbouring inputs, as int8 layers read
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.checks import check_counts, check_flags
from autoprune.errors import ConfigError
from autoprune.patterns.base import Pattern, columns
from autoprune.patterns.permutation import trade_places


class Group(Pattern):
    """Groups of `size` filters keep the same (in, kh, kw); different groups keep different ones.

    A group never straddles the groups of a grouped convolution; the last one of each may be smaller.

    Args:
        size: filters in a group, 1 to 1024.
        permute: choose which filters share a group by their saliency, so that more of it is kept; never less.
        block: neighbouring input channels that are kept or cut together, tap by tap, 1 to 64: 4 is what a dot product
            of bytes reads at once. The last block of a layer may be smaller.
    """

    def __init__(self, size: int = 8, permute: bool = False, block: int = 1) -> None:
        check_counts("pattern 'group'", {"size": size}, most=1024)
        check_flags("pattern 'group'", {"permute": permute})
        check_counts("pattern 'group'", {"block": block}, most=64)
        if permute and block > 1:
            raise ConfigError(
                f"pattern 'group': block={block} takes neighbours, not permute=true: leave one of the two out."
            )
        self.size, self.permute, self.block = size, permute, block

    @property
    def nested(self) -> bool:
        return not self.permute  # who shares a group depends on the sparsity

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        return _cells(self._places(shape[0], conv_groups), shape, self.block)

    def arrange(self, saliency: Tensor, sparsity: float, conv_groups: int = 1) -> Tensor:
        shape, places = tuple(saliency.shape), self._places(len(saliency), conv_groups)
        if not self.permute or sparsity <= 0.0 or not 1 < self.size < shape[0] // conv_groups:
            return _cells(places, shape, self.block)
        rows = saliency.flatten(1)
        kind = self._kinds(rows, conv_groups)
        neighbours, by_norm = torch.empty_like(places), torch.empty_like(places)  # (out,): the group of each filter
        neighbours[kind.argsort(stable=True)] = places
        falling = rows.clamp(min=0).sum(dim=1).argsort(descending=True, stable=True)
        by_norm[falling[kind[falling].argsort(stable=True)]] = places
        traded = trade_places(rows, by_norm, kind, sparsity)

        def kept(cells: Tensor) -> float:
            return float(saliency[self.select(saliency, sparsity, cells)].clamp(min=0).sum())

        return max((_cells(group, shape) for group in (neighbours, traded)), key=kept)

    def check(self, mask: Tensor, conv_groups: int = 1) -> bool:
        if not self.permute:
            return super().check(mask, conv_groups)
        rest = mask.shape[0] // conv_groups % self.size
        for part in mask.flatten(1).chunk(conv_groups):
            _, count = part.unique(dim=0, return_counts=True)
            left = (count % self.size)[count % self.size > 0].tolist()  # what fills no whole group
            if left != ([rest] if rest else []):
                return False
        return True

    def _places(self, filters: int, conv_groups: int) -> Tensor:
        """The group of each place, ``(out,)``."""
        per_group = filters // conv_groups
        blocks = -(-per_group // self.size)
        place = torch.arange(filters)
        return place // per_group * blocks + place % per_group // self.size

    def _kinds(self, rows: Tensor, conv_groups: int) -> Tensor:
        """Which filters may share a group, ``(out,)``: those of one group of the convolution that were cut alike.

        Kinds are numbered in the order of their places: in a group of the convolution, the one with filters left over
        is the last.
        """
        filters = len(rows)
        owner = torch.arange(filters) // (filters // conv_groups)
        if bool((rows >= 0).all()):
            return owner
        alike = torch.cat([owner[:, None].int(), (rows >= 0).int()], dim=1)
        _, kind, count = alike.unique(dim=0, return_inverse=True, return_counts=True)
        left_over = (count % self.size > 0)[kind]
        number: Tensor = (owner * 2 + left_over) * filters + kind
        return number


def _cells(group: Tensor, shape: tuple[int, ...], block: int = 1) -> Tensor:
    taps = columns(shape) // shape[1]
    column = torch.arange(columns(shape))
    of_block = column // taps // block * taps + column % taps
    return (group[:, None] * (int(of_block[-1]) + 1) + of_block).reshape(shape)
