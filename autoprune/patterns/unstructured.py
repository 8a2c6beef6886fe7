"""Unstructured: every weight lives or dies alone (Han et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.patterns.base import Pattern, columns


class Unstructured(Pattern):
    """Any mask is allowed."""

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        return torch.arange(shape[0] * columns(shape)).reshape(shape)
