"""What calibration sees of one value: its range, and a histogram that widens as the range does.

Bins are multiples of a power of two, so that widening joins whole bins: what is kept depends neither on the order of
the batches nor on how samples are cut into them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import Grid

BINS = 8192  # a grid's step is then some 16 bins or more, even on a range cut to half
FINEST = -120  # power of two: finer bins could not be counted in float32


class Observer:
    """The running statistics of one value.

    Args:
        name: of the value, for errors.

    Attributes:
        low: the lowest element so far; infinite before there is one.
        high: the highest.
        count: elements so far.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high, self.count = math.inf, -math.inf, 0
        self._batches = 0
        self._exponent = FINEST  # a bin is 2 ** exponent wide
        self._first = 0  # bin i of `_counts` begins at (first + i) * 2 ** exponent
        self._counts = torch.zeros(0, dtype=torch.int64)

    @property
    def constant(self) -> bool:
        """Whether every element was the same."""
        return self.low == self.high

    @property
    def centres(self) -> Tensor:
        """Float32 values that stand for the elements of each bin, ``(bins,)``."""
        numbers = torch.arange(len(self._counts), dtype=torch.float64) + (self._first + 0.5)
        return (numbers * 2.0**self._exponent).clamp(self.low, self.high).float()

    @property
    def counts(self) -> Tensor:
        """Elements of each bin, ``(bins,)``, int64."""
        return self._counts

    def add(self, x: Tensor) -> None:
        """Counts the elements of a float32 tensor in, of any shape.

        Raises:
            AutopruneError: one is NaN or infinite.
        """
        self._batches += 1
        if not x.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AutopruneError(
                f"the value {self.name!r} is NaN or infinite somewhere in calibration batch {self._batches}. Leave "
                "such samples out of the calibration data."
            )
        self.low, self.high, self.count = min(self.low, low), max(self.high, high), self.count + x.numel()
        self._widen()
        bins = torch.floor(x.detach().flatten() * 2.0**-self._exponent).to(torch.int64).sub_(self._first)
        self._counts += torch.bincount(bins, minlength=len(self._counts))

    def quantile(self, share: float) -> float:
        """The end of the bin up to which this share of the elements lies, within what was observed."""
        below = int(torch.searchsorted(self._counts.cumsum(0), math.ceil(share * self.count)))
        return min(self.high, max(self.low, (self._first + below + 1) * 2.0**self._exponent))

    def noise(self, grid: Grid) -> float:
        """The sum of the squared errors that moving all elements onto a grid makes, as the histogram tells it."""
        centres = self.centres
        return float(((grid.rounded(centres) - centres).double().square() * self._counts).sum())

    def _widen(self) -> None:
        """Makes bins for all that lies between the lowest and the highest element."""
        span = max(self.high - self.low, abs(self.low) / BINS, abs(self.high) / BINS)  # float32 must tell bins apart
        exponent = max(self._exponent, math.frexp(span / (BINS - 2))[1]) if span else self._exponent
        first, last = (math.floor(bound * 2.0**-exponent) for bound in (self.low, self.high))
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        old = torch.arange(len(self._counts)) + self._first
        joined = min(exponent - self._exponent, 62)  # int64 shifts no further
        counts.index_add_(0, (old >> joined) - first, self._counts)
        self._exponent, self._first, self._counts = exponent, first, counts
