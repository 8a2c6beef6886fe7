"""Moving a value onto a grid of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from autoprune.quantization.grid import LEVELS, Grid
from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import integer
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


def _is_scale(value: Any) -> bool:
    if type(value) is not float or not math.isfinite(value) or value <= 0:
        return False
    tiny, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    return tiny <= value <= largest and tiny <= 1 / value <= largest


@dataclass(frozen=True, kw_only=True)
class Quantize(Op):
    """The input moved onto a grid. Layers whose weights are int8 read such values, as bytes.

    Attributes:
        scale: of the grid, a positive float32.
        zero_point: the byte that zero is.
    """

    kind = "quantize"

    scale: Annotated[float, _is_scale]
    zero_point: Annotated[int, integer(0, LEVELS)]

    @property
    def grid(self) -> Grid:
        """The grid its output lies on."""
        return Grid(self.scale, self.zero_point)

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return self.grid.rounded(x[0])

    def batch_rule(self) -> BatchRule:
        return batch_rules.aligned

    def tie_channels(self, bundles: Bundles) -> None:
        bundles.bar(self.output, *self.inputs)  # dead channels are removed before a model is quantised
