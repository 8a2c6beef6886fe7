"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Number, Size
from autoprune.repack.graph.ops.base import BatchRule, Op, Roles, Values


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Op):
    """Layer norm over the last axis, of `size` features."""

    kind = "layer_norm"
    roles: ClassVar[Roles] = {"weight": (1, False), "bias": (1, False)}

    size: Size
    eps: Number

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return F.layer_norm(x[0], (self.size,), w.get("weight"), w.get("bias"), self.eps)

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        for role, name in self.tensors.items():
            if tuple(constants[name].shape) != (self.size,):
                raise FileError(f"{self} has a {role} of {constants[name].numel()} for {self.size} features.")

    def batch_rule(self) -> BatchRule:
        return batch_rules.not_last
