"""The layer as it is: what every other backend has to beat."""

from __future__ import annotations

import copy

from torch import nn

from autoprune.repack.modules.backends.base import Backend, LayerForm, Support


class Dense(Backend):
    """torch's own Conv2d or Linear, zeros and all."""

    def supports(self, form: LayerForm) -> Support:
        return Support(True)

    def lower(self, form: LayerForm) -> nn.Module:
        module = copy.deepcopy(form.module)
        return nn.Sequential(module, nn.ReLU()) if form.relu else module
