"""Attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Number
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """Scaled dot product attention without a mask; inputs (queries, keys, values): ``(batch, heads, tokens, width)``.

    Attributes:
        scale: of the products of queries and keys.
    """

    kind = "attention"
    operands = (3, 3)

    scale: Number

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return F.scaled_dot_product_attention(x[0], x[1], x[2], scale=self.scale)

    def batch_rule(self) -> BatchRule:
        return batch_rules.outer
