"""Root mean square normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Number
from autoprune.repack.graph.ops.base import BatchRule, Op, Roles, Values


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Op):
    """RMS norm over the last axis: ``x / sqrt(mean(x ** 2) + eps) * weight`` (Zhang and Sennrich, 2019)."""

    kind = "rms_norm"
    roles: ClassVar[Roles] = {"weight": (1, False)}

    eps: Number

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return F.rms_norm(x[0], x[0].shape[-1:], w.get("weight"), self.eps)

    def batch_rule(self) -> BatchRule:
        return batch_rules.not_last
