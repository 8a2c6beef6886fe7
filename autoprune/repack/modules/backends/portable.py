"""The portable backend: gathered inputs and smaller dense work in plain torch operators, on any device.

Whole input channels and filters that are dead leave a smaller dense convolution or Linear. Any other structure gathers
the positions each group keeps (for a convolution out of shifted copies of its input) and multiplies group by group.
The same modules are what `export` writes to ONNX, so they are made of operators that inference engines run well.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.repack.modules.backends.base import Backend, LayerForm, Support
from autoprune.repack.modules.dense_weight import DenseWeight
from autoprune.repack.weights.packed import PackedWeight

COMPACT = 0.75  # a smaller dense layer is taken when it has at most this share of the weights


class Portable(Backend):
    """Plain torch; grouped convolutions have no portable form yet."""

    def supports(self, form: LayerForm) -> Support:
        if form.kind not in ("conv2d", "linear"):
            return Support(False, "an LSTM or GRU has no portable form")
        if form.odd_padding:
            return Support(False, form.odd_padding)
        if form.conv_groups > 1:
            return Support(False, "grouped convolutions have no portable form")
        if not bool(form.weight.any()):
            return Support(False, "every weight is zero")
        return Support(True)

    def lower(self, form: LayerForm) -> nn.Module:
        if compact_share(form) <= COMPACT:
            return Compacted(form)
        return GatheredConv2d(form) if form.kind == "conv2d" else GatheredLinear(form)


def _alive(form: LayerForm) -> tuple[Tensor, Tensor]:
    """Filters and input channels that have a weight that is not zero."""
    alive = form.weight.flatten(2) if form.kind == "conv2d" else form.weight[:, :, None]
    alive = alive.any(dim=2)  # (out, in)
    return alive.any(dim=1), alive.any(dim=0)


def compact_share(form: LayerForm) -> float:
    """The share of a layer's weights that lie in a filter and a channel that are alive, in [0, 1]."""
    filters, channels = _alive(form)
    return int(filters.sum()) * int(channels.sum()) / (len(filters) * len(channels))


class _Portable(nn.Module):
    """Keeps the packed weight too: it is what is saved, and what code that reads `weight` gets."""

    constant: Tensor

    def __init__(self, form: LayerForm) -> None:
        super().__init__()
        self.packed, self.has_bias, self.relu = form.packed, form.bias is not None, form.relu
        bias = form.weight.new_zeros(form.weight.shape[0]) if form.bias is None else form.bias.clone()
        self.register_buffer("constant", bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return DenseWeight.of(self.packed.shape, self.packed.unpack)

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``(out,)``, or None."""
        return self.constant if self.has_bias else None


class Compacted(_Portable):
    """A smaller dense layer behind a selection of input channels; dead filters are added as constants."""

    channels: Tensor
    order: Tensor
    dead: Tensor

    def __init__(self, form: LayerForm) -> None:
        super().__init__(form)
        filters, channels = _alive(form)
        self.all_channels, self.all_filters = bool(channels.all()), bool(filters.all())
        self.from_last = 3 if form.kind == "conv2d" else 1  # the channels' axis; a convolution may have no batch
        self.register_buffer("channels", channels.nonzero().flatten().int())
        self.register_buffer("order", torch.argsort(torch.argsort(~filters, stable=True)).int())
        self.register_buffer("dead", self.constant[~filters].reshape(-1, *[1] * (self.from_last - 1)))
        layer = copy.deepcopy(form.module)
        layer.weight = nn.Parameter(form.weight[filters][:, channels].clone(), requires_grad=False)
        layer.bias = nn.Parameter(self.constant[filters].clone(), requires_grad=False)
        if isinstance(layer, nn.Conv2d):
            layer.in_channels, layer.out_channels = int(channels.sum()), int(filters.sum())
        else:
            layer.in_features, layer.out_features = int(channels.sum()), int(filters.sum())
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        x, axis = input, input.dim() - self.from_last
        if not self.all_channels:
            x = x.index_select(axis, self.channels)
        y: Tensor = self.layer(x)
        if not self.all_filters:
            dead = self.dead.expand(*y.shape[:axis], -1, *y.shape[axis + 1 :])
            y = torch.cat([y, dead], axis).index_select(axis, self.order)
        return functional.relu(y) if self.relu else y


def by_group(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight of one convolution group as arrays, padded to the longest group.

    Returns:
        positions ``(groups, longest)``, values ``(groups, size, longest)``, and for each filter the row
        ``group * size + member`` it is, ``(out,)``. Padding has the value zero at a position the group does not keep.
    """
    kept = np.diff(packed.group_pointer)
    columns, longest = int(np.prod(packed.shape[1:])), max(1, int(kept.max(initial=0)))
    group = np.repeat(np.arange(packed.groups), kept)
    at = np.arange(len(packed.index)) - np.repeat(packed.group_pointer[:-1], kept)
    keeps = np.zeros((packed.groups, columns), np.bool_)
    keeps[group, packed.index] = True
    positions = np.repeat(keeps.argmin(axis=1)[:, None], longest, axis=1).astype(np.int32)
    positions[group, at] = packed.index
    values = np.zeros((packed.groups, packed.group_size, longest), np.float32)
    values[group, :, at] = packed.values
    flat = packed.out_index.ravel()
    order = np.empty(packed.shape[0], np.int32)
    order[flat[flat >= 0]] = np.nonzero(flat >= 0)[0]
    return torch.from_numpy(positions), torch.from_numpy(values), torch.from_numpy(order)


class _Gathered(_Portable):
    positions: Tensor
    values: Tensor
    order: Tensor

    def __init__(self, form: LayerForm) -> None:
        super().__init__(form)
        positions, values, order = (each.to(form.weight.device) for each in by_group(form.packed))
        self.in_order = len(order) == values.shape[0] * values.shape[1] and bool((order[1:] > order[:-1]).all())
        for name, tensor in (("positions", positions), ("values", values), ("order", order)):
            self.register_buffer(name, tensor)

    def _multiply(self, columns: Tensor) -> Tensor:
        """(batch, in, positions) -> (batch, out, positions), bias added."""
        groups, longest = self.positions.shape
        gathered = columns.index_select(1, self.positions.flatten())
        gathered = gathered.reshape(columns.shape[0], groups, longest, columns.shape[2])
        y = torch.matmul(self.values, gathered).flatten(1, 2)  # (batch, groups * size, positions)
        if not self.in_order:
            y = y.index_select(1, self.order)
        y = y + self.constant[:, None]
        return functional.relu(y) if self.relu else y


class GatheredConv2d(_Gathered):
    """A convolution as gathered rows of its input, one copy of the input a kernel position."""

    def __init__(self, form: LayerForm) -> None:
        super().__init__(form)
        self.kernel = (form.weight.shape[2], form.weight.shape[3])
        self.stride, self.padding, self.dilation = form.window
        taps, channels = self.kernel[0] * self.kernel[1], form.weight.shape[1]
        self.positions = self.positions % taps * channels + self.positions // taps  # the copies lie one after another

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input[None])[0]
        x = functional.pad(input, (self.padding[1],) * 2 + (self.padding[0],) * 2) if any(self.padding) else input
        high, wide = (
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(x.shape[2:], self.dilation, self.kernel, self.stride, strict=True)
        )
        bands = _shifted(x, 2, high, self.kernel[0], self.stride[0], self.dilation[0])
        copies = [
            copy for band in bands for copy in _shifted(band, 3, wide, self.kernel[1], self.stride[1], self.dilation[1])
        ]
        x = torch.cat(copies, 1) if len(copies) > 1 else copies[0]
        y: Tensor = self._multiply(x.flatten(2)).unflatten(2, (high, wide))
        return y


def _shifted(x: Tensor, axis: int, extent: int, taps: int, stride: int, dilation: int) -> list[Tensor]:
    """What each kernel position reads along one axis: `extent` slices of `x`."""
    if taps == stride == 1:
        return [x]
    first, length = (tap * dilation for tap in range(taps)), (extent - 1) * stride + 1
    # Indexing would export as a slice of each axis.
    return [torch.ops.aten.slice.Tensor(x, axis, at, at + length, stride) for at in first]


class GatheredLinear(_Gathered):
    """A Linear as gathered features."""

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.reshape(-1, input.shape[-1])  # (tokens, in)
        y: Tensor = self._multiply(tokens.t()[None])[0].t().reshape(*input.shape[:-1], len(self.order))
        return y
