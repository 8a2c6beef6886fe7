"""Channel gates: which channels of a convolution are worth computing, told from its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from autoprune.errors import FileError
from autoprune.model.channel_gates import saliency, scaled, winners
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Count
from autoprune.repack.graph.ops.base import BatchRule, Op, Roles, Values


@dataclass(frozen=True, kw_only=True)
class Gate(Op):
    """The predictor of a gated convolution. Map -> factors ``(batch, groups of filters)``, zero where none is kept.

    Attributes:
        keep: how many groups are kept.
    """

    kind = "gate"
    roles: ClassVar[Roles] = {"weight": (2, True), "bias": (1, True), "threshold": (1, True)}

    keep: Count

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        scores = saliency(x[0], w["weight"], w["bias"])
        return winners(scores, w["threshold"], min(self.keep, scores.shape[1]))

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        weight, bias, threshold = (constants[self.tensors[role]] for role in ("weight", "bias", "threshold"))
        if min(weight.shape) < 1 or bias.shape != weight.shape[:1] or threshold.numel() != 1:
            raise FileError(f"{self} has a weight of shape {tuple(weight.shape)} and a bias that does not fit it.")
        if len({weight.dtype, bias.dtype, threshold.dtype}) > 1:
            raise FileError(f"{self} has weights of types that differ.")
        if self.keep > len(weight):
            raise FileError(f"{self} keeps {self.keep} of {len(weight)} groups.")

    def batch_rule(self) -> BatchRule:
        return batch_rules.first


@dataclass(frozen=True, kw_only=True)
class Scale(Op):
    """A map's channels times the factors of a gate: inputs (map, factors)."""

    kind = "scale"
    operands = (2, 2)

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return scaled(x[0], x[1])

    def batch_rule(self) -> BatchRule:
        return batch_rules.first
