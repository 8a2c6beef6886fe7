"""Block: `rows` filters stop reading `columns` input channels together (after Narang et al. 2017, block-sparse)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.checks import check_counts
from autoprune.patterns.base import Pattern


class Block(Pattern):
    """Blocks of neighbouring filters by neighbouring input channels, all kernel positions of each, live or die.

    A block never straddles the groups of a grouped convolution; the last ones of each may be smaller. One row and one
    column is kernel pruning: a filter reads an input channel or does not.

    Args:
        rows: filters of a block, 1 to 1024.
        columns: input channels of a block, 1 to 1024.
    """

    def __init__(self, rows: int = 8, columns: int = 8) -> None:
        check_counts("pattern 'block'", {"rows": rows, "columns": columns}, most=1024)
        self.rows, self.columns = rows, columns

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        per_group = shape[0] // conv_groups
        filter_, channel = torch.arange(shape[0]), torch.arange(shape[1])
        row = filter_ // per_group * -(-per_group // self.rows) + filter_ % per_group // self.rows
        cell = row[:, None] * -(-shape[1] // self.columns) + channel // self.columns  # (out, in / conv_groups)
        return cell.reshape(*cell.shape, *(1,) * (len(shape) - 2)).expand(shape).contiguous()
