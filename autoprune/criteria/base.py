"""What a criterion is: a rule that scores every weight of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What one calibration pass saw of a layer.

    Attributes:
        gradient: sum over batches of |dL/dw| in the weight's shape, or None when no criterion asked for it.
        input_norm: L2 norm of each input channel over all positions, ``(in,)``, or None likewise.
    """

    gradient: Tensor | None = None
    input_norm: Tensor | None = None


class Criterion(ABC):
    """Scores weights; `needs` names the LayerStatistics fields that `saliency` reads."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        """Returns scores >= 0 in the weight's shape."""
