"""The portable backend: gathered inputs and smaller dense work in plain torch operators, on any device.

Whole input channels and filters that are dead leave a smaller dense convolution or Linear. Any other structure gathers
the positions each group keeps (for a convolution out of its unfolded input) and multiplies group by group.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.repack.backends.base import Backend, LayerForm, Support
from autoprune.repack.formats import PackedWeight

COMPACT = 0.75  # a smaller dense layer is taken when it has at most this share of the weights


class Portable(Backend):
    """Plain torch; grouped convolutions have no portable form yet."""

    def supports(self, form: LayerForm) -> Support:
        if form.odd_padding:
            return Support(False, form.odd_padding)
        if form.conv_groups > 1:
            return Support(False, "grouped convolutions have no portable form")
        if not bool(form.weight.any()):
            return Support(False, "every weight is zero")
        return Support(True)

    def lower(self, form: LayerForm) -> nn.Module:
        alive = form.weight.flatten(2) if form.kind == "conv2d" else form.weight[:, :, None]
        alive = alive.any(dim=2)  # (out, in)
        filters, channels = alive.any(dim=1), alive.any(dim=0)
        if int(filters.sum()) * int(channels.sum()) <= COMPACT * alive.numel():
            return Compacted(form, filters, channels)
        return GatheredConv2d(form) if form.kind == "conv2d" else GatheredLinear(form)


class _Portable(nn.Module):
    """Keeps the packed weight too: it is what is saved, and what code that reads `weight` gets."""

    constant: Tensor

    def __init__(self, form: LayerForm) -> None:
        super().__init__()
        self.packed, self.has_bias = form.packed, form.bias is not None

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt."""
        return self.packed.unpack()

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``(out,)``, or None."""
        return self.constant if self.has_bias else None


class Compacted(_Portable):
    """A smaller dense layer between a selection of input channels and a scatter of filters."""

    channels: Tensor
    filters: Tensor

    def __init__(self, form: LayerForm, filters: Tensor, channels: Tensor) -> None:
        super().__init__(form)
        self.all_channels, self.all_filters = bool(channels.all()), bool(filters.all())
        self.axis, self.relu = (1, form.relu) if form.kind == "conv2d" else (-1, form.relu)
        self.register_buffer("channels", channels.nonzero().flatten())
        self.register_buffer("filters", filters.nonzero().flatten())
        bias = torch.zeros(form.weight.shape[0]) if form.bias is None else form.bias
        self.register_buffer("constant", bias.clone())
        layer = copy.deepcopy(form.module)
        layer.weight = nn.Parameter(form.weight[filters][:, channels].clone(), requires_grad=False)
        layer.bias = nn.Parameter(bias[filters].clone(), requires_grad=False)
        if isinstance(layer, nn.Conv2d):
            layer.in_channels, layer.out_channels = int(channels.sum()), int(filters.sum())
        else:
            layer.in_features, layer.out_features = int(channels.sum()), int(filters.sum())
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        x = input
        axis = x.dim() - 3 if self.axis == 1 else x.dim() - 1  # a convolution may come without a batch
        if not self.all_channels:
            x = x.index_select(axis, self.channels)
        y: Tensor = self.layer(x)
        if not self.all_filters:
            shape = [1] * y.dim()
            shape[axis] = -1
            full = self.constant.reshape(shape).expand(*y.shape[:axis], -1, *y.shape[axis + 1 :])
            y = full.index_copy(axis, self.filters, y)
        return functional.relu(y) if self.relu else y


def _by_group(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Padded to the longest group: positions (groups, kept), values (groups, size, kept), rows in output order."""
    kept = np.diff(packed.group_pointer)
    longest = max(1, int(kept.max(initial=0)))
    positions = np.zeros((packed.groups, longest), np.int64)
    values = np.zeros((packed.groups, longest, packed.group_size), np.float32)
    for group, (low, high) in enumerate(zip(packed.group_pointer, packed.group_pointer[1:], strict=False)):
        positions[group, : high - low] = packed.index[low:high]
        values[group, : high - low] = packed.values[low:high]
    flat = packed.out_index.ravel()
    order = np.empty(packed.shape[0], np.int64)
    order[flat[flat >= 0]] = np.nonzero(flat >= 0)[0]
    return torch.from_numpy(positions), torch.from_numpy(values).transpose(1, 2).contiguous(), torch.from_numpy(order)


class _Gathered(_Portable):
    positions: Tensor
    values: Tensor
    order: Tensor

    def __init__(self, form: LayerForm) -> None:
        super().__init__(form)
        positions, values, order = _by_group(form.packed)
        bias = torch.zeros(form.weight.shape[0]) if form.bias is None else form.bias.clone()
        self.relu = form.relu
        for name, tensor in (("positions", positions), ("values", values), ("order", order), ("constant", bias)):
            self.register_buffer(name, tensor)

    def _multiply(self, columns: Tensor) -> Tensor:
        """(batch, in, positions) -> (batch, out, positions), bias added."""
        groups, longest = self.positions.shape
        gathered = columns.index_select(1, self.positions.flatten())
        gathered = gathered.reshape(columns.shape[0], groups, longest, columns.shape[2])
        y = torch.matmul(self.values, gathered).flatten(1, 2)  # (batch, groups * size, positions)
        y = y.index_select(1, self.order) + self.constant[:, None]
        return functional.relu(y) if self.relu else y


class GatheredConv2d(_Gathered):
    """A convolution as gathered columns of its unfolded input."""

    def __init__(self, form: LayerForm) -> None:
        super().__init__(form)
        self.kernel = (form.weight.shape[2], form.weight.shape[3])
        self.stride, self.padding, self.dilation = form.window

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input[None])[0]
        x = input
        high, wide = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        columns = functional.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        y: Tensor = self._multiply(columns).unflatten(2, (high, wide))
        return y


class GatheredLinear(_Gathered):
    """A Linear as gathered features."""

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.reshape(-1, input.shape[-1])  # (tokens, in)
        y: Tensor = self._multiply(tokens.t()[None])[0].t().reshape(*input.shape[:-1], len(self.order))
        return y
