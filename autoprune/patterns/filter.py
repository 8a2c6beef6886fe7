"""Filter: an output filter (or a neuron) lives or dies as a whole (Li et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.patterns.base import Pattern, columns


class Filter(Pattern):
    """Whole rows of the weight are kept or cut: the filters of a convolution, the neurons of a Linear.

    In training a cut filter loses its bias and its row of the batch norm behind it too (`apply_masks_`): it gives
    zero, and repacking removes it. Of an LSTM or GRU it cuts hidden units, the same ones from ``weight_ih`` and
    ``weight_hh`` where both are as sparse.
    """

    whole_filters = True

    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        return torch.arange(shape[0])[:, None].expand(shape[0], columns(shape)).reshape(shape).contiguous()
