"""What a backend is, and the form of a layer that it lowers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from autoprune.masks import sparsity
from autoprune.model.recurrent.names import GATES, by_unit, cell_of, layers_of
from autoprune.repack.weights.packed import PackedWeight, find_group_size, pack


@dataclass(frozen=True)
class LayerForm:
    """One layer with zeros in its weight, and what is fused behind it.

    Attributes:
        module: a Conv2d, Linear, LSTM or GRU, float32, in eval mode; never changed.
        relu: whether the layer's output goes through a ReLU that the lowered module must apply.
    """

    module: nn.Conv2d | nn.Linear | nn.LSTM | nn.GRU
    relu: bool = False

    @property
    def kind(self) -> str:
        return cell_of(self.module) or ("conv2d" if isinstance(self.module, nn.Conv2d) else "linear")

    @property
    def weight(self) -> Tensor:
        """Dense, zeros and all; of an LSTM or GRU all its weights in one row."""
        if isinstance(self.module, (nn.LSTM, nn.GRU)):
            return torch.cat([layer.weight.detach().flatten() for layer in layers_of(self.module).values()])
        return self.module.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        assert isinstance(self.module, (nn.Conv2d, nn.Linear))
        return None if self.module.bias is None else self.module.bias.detach()

    @property
    def conv_groups(self) -> int:
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def sparsity(self) -> float:
        return sparsity(self.weight)

    @cached_property
    def packed(self) -> PackedWeight:
        """The structure found from the zeros."""
        return pack(self.weight, self.conv_groups)

    @property
    def group_size(self) -> int:
        """Filters that share their kept positions; the least of an LSTM's or GRU's weights."""
        if isinstance(self.module, (nn.LSTM, nn.GRU)):
            gates = GATES[self.kind]
            weights = [layer.weight.detach() for layer in layers_of(self.module).values()]
            return min(find_group_size(by_unit(weight, gates)) for weight in weights)
        return self.packed.group_size

    @property
    def window(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding and dilation of a convolution."""
        assert isinstance(self.module, nn.Conv2d)
        stride, dilation = self.module.stride, self.module.dilation
        return (stride[0], stride[1]), conv_padding(self.module), (dilation[0], dilation[1])

    @property
    def odd_padding(self) -> str | None:
        """Why `window` does not say all of the layer's padding; None when it does."""
        if not isinstance(self.module, nn.Conv2d):
            return None
        if self.module.padding_mode != "zeros":
            return f"padding mode {self.module.padding_mode!r} has no packed form"
        extents = zip(self.module.dilation, self.module.kernel_size, strict=True)
        if self.module.padding == "same" and any(d * (k - 1) % 2 for d, k in extents):
            return "'same' padding of an even kernel has no packed form"
        return None


@dataclass(frozen=True)
class Support:
    """Whether a backend can lower a layer; `why` not."""

    ok: bool
    why: str = ""


class Backend(ABC):
    """Packs one layer. The lowered module is called like the layer and gives the same output."""

    @abstractmethod
    def supports(self, form: LayerForm) -> Support:
        """Whether this backend can lower the layer; cheap."""

    @abstractmethod
    def lower(self, form: LayerForm) -> nn.Module:
        """Returns the module that runs the layer."""


def conv_padding(module: nn.Conv2d) -> tuple[int, int]:
    """The zero rows and columns added on each side, for numeric and string paddings alike."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        high, wide = (d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return (high, wide)
    return (int(module.padding[0]), int(module.padding[1]))
