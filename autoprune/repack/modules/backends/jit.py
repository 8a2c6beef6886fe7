"""Packed kernels compiled for the host: offset-GEMM for convolutions, filter-vectorised dot products for Linear."""

from __future__ import annotations

from torch import nn

from autoprune.repack.kernels.compiler import unavailable
from autoprune.repack.modules.backends.base import Backend, LayerForm, Support
from autoprune.repack.modules.layers import PackedConv2d, PackedLinear
from autoprune.repack.modules.sequences import PackedRecurrent


class Jit(Backend):
    """CPU, float32. Dense layers too: a layer without zeros is one whose groups keep everything."""

    def supports(self, form: LayerForm) -> Support:
        if form.weight.device.type != "cpu":
            return Support(False, f"its weight is on {form.weight.device}; the kernels run on the CPU")
        reason = form.odd_padding or unavailable()
        return Support(reason is None, reason or "")

    def lower(self, form: LayerForm) -> nn.Module:
        if isinstance(form.module, (nn.LSTM, nn.GRU)):
            return PackedRecurrent.of(form.module)
        if form.kind == "linear":
            return PackedLinear(form.packed, form.bias, form.relu)
        return PackedConv2d(form.packed, form.bias, *form.window, form.relu)
