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
        cross_moments: mean of ``y c^T``, y being the output that is wanted of the layer, ``(conv_groups, out /
            conv_groups, columns)``. None where that is what the weight itself makes of its input.
    """

    gradient: Tensor | None = None
    input_norm: Tensor | None = None
    squared_gradient: Tensor | None = None
    input_moments: Tensor | None = None
    cross_moments: Tensor | None = None


class Criterion(ABC):
    """Scores weights; `needs` names the LayerStatistics fields that `saliency` reads.

    Attributes:
        steps: in how many a layer is cut; before each, what is left is scored by `saliency_left`. 1: `saliency`, once.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    steps: int = 1

    @abstractmethod
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        """Returns scores >= 0 in the weight's shape."""

    def saliency_left(
        self, weight: Tensor, statistics: LayerStatistics, kept: Tensor, cells: Tensor, conv_groups: int = 1
    ) -> Tensor:
        """Scores >= 0 of a layer that is cut in part, in the weight's shape; for `steps` above 1.

        Args:
            weight: of the dense layer.
            statistics: of the layer.
            kept: what is not cut yet, bool.
            cells: the number of the cell of each weight.
            conv_groups: groups of a grouped convolution.
        """
        return self.saliency(weight * kept, statistics, conv_groups)
