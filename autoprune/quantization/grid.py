"""The grids of 8-bit integers: activations in unsigned bytes with a zero point, weights in signed ones without.

Zero is always on the grid, so that padding, dead channels and cut weights stay exact. Rounding is half to even, as in
torch, ONNX Runtime and the kernels; the product by the inverse scale is one float32 product, as in the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import AutopruneError

LEVELS = 255  # the highest byte of an activation
WEIGHT_LEVELS = 127  # of a weight; -128 is not used, so that a weight and its negative are both on the grid


@dataclass(frozen=True)
class Grid:
    """What the bytes of a value stand for: byte q for ``(q - zero_point) * scale``.

    Attributes:
        scale: the step, a positive float32.
        zero_point: the byte of zero, 0 to 255.
    """

    scale: float
    zero_point: int = 0

    def __post_init__(self) -> None:
        fine = math.isfinite(self.scale) and float(np.float32(self.scale)) > 0 and math.isfinite(self.inverse)
        if not fine or not 0 <= self.zero_point <= LEVELS:
            raise AutopruneError(
                f"a grid has the scale {self.scale} and the zero point {self.zero_point}; the scale must be positive "
                f"and finite, the zero point 0 to {LEVELS}."
            )

    @property
    def inverse(self) -> float:
        """What values are multiplied by: the float32 nearest to ``1 / scale``."""
        with np.errstate(over="ignore"):
            return float(np.float32(1) / np.float32(self.scale))

    @property
    def low(self) -> float:
        """The lowest value."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The highest value."""
        return (LEVELS - self.zero_point) * self.scale

    @classmethod
    def of_range(cls, low: float, high: float) -> Grid:
        """The finest grid from `low` to `high` and zero; of zero alone where both are zero.

        Raises:
            AutopruneError: a bound is not finite, or they are in the wrong order.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise AutopruneError(f"there is no grid from {low} to {high}: both must be finite, the first not larger.")
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32((high - low) / LEVELS))
        if scale < float(np.finfo(np.float32).tiny):
            return cls(1.0, 0)
        return cls(scale, min(LEVELS, max(0, round(-low / scale))))

    def quantize(self, x: Tensor) -> Tensor:
        """The bytes of float32 values, of x's shape; what lies beyond the grid goes to its ends, NaN to the lowest."""
        q = torch.round(x * self.inverse) + self.zero_point
        return torch.nan_to_num(q, nan=0.0).clamp(0, LEVELS).to(torch.uint8)

    def dequantize(self, q: Tensor) -> Tensor:
        """The float32 values of bytes."""
        return (q.to(torch.float32) - self.zero_point) * self.scale

    def rounded(self, x: Tensor) -> Tensor:
        """Float32 values moved onto the grid, of x's shape; NaN stays NaN."""
        q = (x * self.inverse).round_().add_(self.zero_point).clamp_(0, LEVELS)
        return q.sub_(self.zero_point).mul_(self.scale)


def weight_scales(weight: Tensor, levels: int = WEIGHT_LEVELS) -> Tensor:
    """The scale of each filter, ``(out,)``: its largest magnitude is `levels` steps; 1 for a filter of zeros.

    Args:
        weight: dense float32, ``(out, ...)``.
        levels: steps on either side of zero: 127, or 63 where pairs of products must fit 16 bits.

    Raises:
        AutopruneError: a weight is not finite.
    """
    largest = weight.detach().flatten(1).abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise AutopruneError("a weight that is NaN or infinite cannot be quantised.")
    scales = largest / levels
    return torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
