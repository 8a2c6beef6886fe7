"""Mixtures of experts: a matrix for each run of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from autoprune.repack.graph.ops.base import Op, Roles, Values


@dataclass(frozen=True, kw_only=True)
class Experts(Op):
    """The product of each row with the matrix of its expert; rows of one expert follow each other.

    Weight ``(experts, features, filters)``, result ``(rows, filters)``. What lies behind the last expert's rows is 0.

    Attributes:
        inputs: rows ``(rows, features)``; where those of each expert end, integers ``(experts,)`` that do not fall.
    """

    kind = "experts"
    operands = (2, 2)
    roles: ClassVar[Roles] = {"weight": (3, True)}

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        rows, ends = x
        weight = w["weight"]
        made: Tensor = rows.new_zeros(rows.shape[0], weight.shape[2])
        if rows.ndim != 2 or rows.shape[1] != weight.shape[1] or ends.shape != weight.shape[:1]:
            shapes = f"{tuple(rows.shape)}, {tuple(ends.shape)} and a weight of {tuple(weight.shape)}"
            raise ValueError(f"{self} does not take tensors of {shapes}.")
        if made.is_meta:
            return made
        start = 0
        for matrix, end in zip(weight, ends.tolist(), strict=True):
            if end > start:
                made[start:end] = rows[start:end] @ matrix
                start = end
        return made
