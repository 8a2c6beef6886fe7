"""Group-wise: `size` consecutive filters share their kept positions (after 1xN, Lin et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.errors import ConfigError
from autoprune.patterns.base import Pattern, columns


class Group(Pattern):
    """Groups of `size` filters keep the same (in, kh, kw); different groups keep different ones.

    A group never straddles the groups of a grouped convolution; the last one of each may be smaller.
    """

    def __init__(self, size: int = 8) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1024:
            raise ConfigError(f"pattern 'group': size must be an integer from 1 to 1024, not {size!r}.")
        self.size = size

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        per_group = shape[0] // conv_groups  # filters of one convolution group
        blocks = -(-per_group // self.size)
        filters = torch.arange(shape[0])
        block = filters // per_group * blocks + filters % per_group // self.size  # (out,)
        return (block[:, None] * columns(shape) + torch.arange(columns(shape))).reshape(shape)
