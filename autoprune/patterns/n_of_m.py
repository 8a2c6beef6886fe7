"""N:M: at most `n` of every `m` consecutive input weights are kept (Mishra et al. 2021)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from autoprune.errors import ConfigError
from autoprune.patterns.base import Pattern, columns


class NOfM(Pattern):
    """`n` of `m` along the input dimension, at each filter and kernel position. One sparsity: 1 - n/m.

    A layer asked for less than half of that sparsity stays dense.
    """

    any_sparsity: ClassVar[bool] = False

    def __init__(self, n: int = 2, m: int = 4) -> None:
        if not (isinstance(n, int) and isinstance(m, int) and 1 <= n < m <= 64):
            raise ConfigError(f"pattern 'n:m': n and m must be integers with 1 <= n < m <= 64, not n={n!r}, m={m!r}.")
        self.n, self.m = n, m

    @property
    def nested(self) -> bool:
        return False  # blocks are ranked one by one, and only above some sparsity

    def on_the_way(self, sparsity: float) -> Pattern:
        kept = math.ceil((1.0 - sparsity) * self.m - 1e-9)
        return NOfM(max(self.n, min(kept, self.m - 1)), self.m)

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        return torch.arange(shape[0] * columns(shape)).reshape(shape)

    def select(self, saliency: Tensor, sparsity: float, cells: Tensor) -> Tensor:
        if sparsity < self._sparsity / 2:
            return torch.ones_like(saliency, dtype=torch.bool)
        blocks, extra = self._blocks(saliency.detach().double() + 1.0)  # +1: padding ranks below a zero saliency
        kept = torch.zeros_like(blocks, dtype=torch.bool)
        kept.scatter_(-1, blocks.argsort(dim=-1, descending=True, stable=True)[..., : self.n], True)
        return self._unblocks(kept, saliency.shape, extra)

    def feasible(self, shape: tuple[int, ...], sparsity: float, conv_groups: int = 1) -> float:
        if sparsity < self._sparsity / 2:
            return 0.0
        whole, rest = divmod(shape[1], self.m)
        return 1.0 - (whole * self.n + min(self.n, rest)) / shape[1]

    def check(self, mask: Tensor, conv_groups: int = 1) -> bool:
        if bool(mask.all()):
            return True
        blocks, _ = self._blocks(mask.float())
        return bool((blocks.sum(-1) <= self.n).all())

    @property
    def _sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def _blocks(self, values: Tensor) -> tuple[Tensor, int]:
        extra = -values.shape[1] % self.m
        last = torch.nn.functional.pad(values.movedim(1, -1), (0, extra))
        return last.unflatten(-1, (-1, self.m)), extra

    def _unblocks(self, blocks: Tensor, shape: torch.Size, extra: int) -> Tensor:
        flat = blocks.flatten(-2)
        return flat[..., : flat.shape[-1] - extra].movedim(-1, 1).reshape(shape).contiguous()
