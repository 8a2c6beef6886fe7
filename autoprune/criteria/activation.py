"""Activation-aware: |w| times the norm of the input it reads (Wanda, Sun et al. 2024)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autoprune.criteria.base import Criterion, LayerStatistics


class Activation(Criterion):
    """|w| times the L2 norm of its input channel over the calibration batches."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})

    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        assert statistics.input_norm is not None
        out, per_group = weight.shape[0], weight.shape[1]
        norm = statistics.input_norm.reshape(conv_groups, 1, per_group)  # (conv_groups, 1, in / conv_groups)
        norm = norm.expand(conv_groups, out // conv_groups, per_group).reshape(out, per_group)
        return weight.detach().abs() * norm.reshape(out, per_group, *(1,) * (weight.ndim - 2))
