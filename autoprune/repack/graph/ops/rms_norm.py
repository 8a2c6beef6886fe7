"""Root mean square normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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
        share = torch.rsqrt(x[0].pow(2).mean(-1, keepdim=True) + self.eps)  # what every ONNX engine knows
        normed: Tensor = x[0] * share
        return normed * w["weight"] if "weight" in w else normed

    def batch_rule(self) -> BatchRule:
        return batch_rules.not_last
