"""Linear layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Flag
from autoprune.repack.graph.ops.base import BatchRule, Roles, Values
from autoprune.repack.graph.ops.layer import FusedLayerOp


@dataclass(frozen=True, kw_only=True)
class Linear(FusedLayerOp):
    """A product over the last axis. ``(..., features)``, weight ``(filters, features)``.

    Attributes:
        bf16: whether it multiplies bfloat16 numbers.
    """

    kind = "linear"
    operands = (1, 2)
    roles: ClassVar[Roles] = {"weight": (2, True), "bias": (1, False), "scale": (1, False)}

    bf16: Flag = False

    @property
    def in_bf16(self) -> bool:
        return self.bf16

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return self.finished(F.linear(self.multiplied(x[0]), w["weight"], w.get("bias")), x[1] if len(x) > 1 else None)

    def positions(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // shape[-1]

    def batch_rule(self) -> BatchRule:
        return batch_rules.not_last

    def tie_channels(self, bundles: Bundles) -> None:
        self.tie_filters(bundles, is_map=False)
