"""What a criterion is: a rule that scores every weight of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What one calibration pass saw of a layer, its weight taken as the operator reads it.

    Attributes:
        gradient: sum over batches of |dL/dw| in the weight's shape, or None when no criterion asked for it.
        input_norm: L2 norm of each input channel over all positions, ``(in,)``, or None likewise.
        squared_gradient: mean over samples of (dL/dw)^2 of a sample's own loss, in the weight's shape, or None
            likewise. A sample is an index of the first axis of the layer's input, and the loss a mean over them.
        input_moments: mean over samples and positions of ``c c^T``, c being the columns that a row of the weight
            multiplies, ``(conv_groups, in / conv_groups * kh * kw, likewise)``, or None likewise.
    """

    gradient: Tensor | None = None
    input_norm: Tensor | None = None
    squared_gradient: Tensor | None = None
    input_moments: Tensor | None = None


class Criterion(ABC):
    """Scores weights; `needs` names the LayerStatistics fields that `saliency` reads."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        """Returns scores >= 0 in the weight's shape."""
