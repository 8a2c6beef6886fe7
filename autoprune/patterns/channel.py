"""Channel: an input channel of a layer lives or dies with every weight that reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.patterns.base import Pattern


class Channel(Pattern):
    """All filters (of one convolution group) stop reading the same input channels."""

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        reads = torch.arange(shape[0]) // (shape[0] // conv_groups) * shape[1]  # (out,)
        cell = reads[:, None] + torch.arange(shape[1])  # (out, in / conv_groups)
        return cell.reshape(*cell.shape, *(1,) * (len(shape) - 2)).expand(shape).contiguous()
