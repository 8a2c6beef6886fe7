"""Attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Flag, Number
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """Scaled dot product attention.

    A query that may look at no key gets zeros.

    Attributes:
        inputs: queries ``(..., queries, width)``; keys ``(..., keys, width)``; values ``(..., keys, value width)``;
            and, where there is one, what is added to the scaled products of queries and keys: floats that broadcast to
            ``(..., queries, keys)``, or booleans, False for minus infinity.
        scale: of the products of queries and keys.
        causal: whether a query looks at no key of a larger number than its own.
    """

    kind = "attention"
    operands = (3, 4)

    scale: Number
    causal: Flag = False

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        if self.causal and len(self.inputs) > 3:
            raise FileError(f"{self} is causal, and has a mask too.")

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        mask = x[3] if len(x) > 3 else None
        return F.scaled_dot_product_attention(x[0], x[1], x[2], mask, is_causal=self.causal, scale=self.scale)

    def batch_rule(self) -> BatchRule:
        return batch_rules.attending
