"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


@dataclass(frozen=True, kw_only=True)
class Rotary(Op):
    """Rotary position embedding (Su et al., 2021): feature i of the first half and of the second are turned together.

    Attributes:
        inputs: what is turned, ``(..., features)``; cosines and sines of the angles, which broadcast to its shape.
    """

    kind = "rotary"
    operands = (3, 3)

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        given, cos, sin = x
        half = given.shape[-1] // 2
        turned: Tensor = given * cos + torch.cat((-given[..., half:], given[..., :half]), -1) * sin
        return turned

    def batch_rule(self) -> BatchRule:
        return batch_rules.outer
