"""The methods of a model that became a program: its own code, whose layers share the program's packed weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprune.repack.lowering.weights import Weights
from autoprune.repack.modules.layers import PackedConv2d, PackedLayer, PackedLinear
from autoprune.repack.modules.replacement import with_submodule


def has_methods(model: nn.Module) -> bool:
    """Whether users may call more of it than the model itself: its class has public methods that are not torch's."""
    written = [each for each in type(model).__mro__ if not each.__module__.startswith("torch.") and each is not object]
    names = {name for each in written for name in vars(each) if name[0] != "_"} - set(dir(nn.Module))
    return any(callable(getattr(type(model), name, None)) for name in names)


def sharing(model: nn.Module, packed: Mapping[str, Weights]) -> nn.Module:
    """The model with those of its layers packed that the program left as they were; changes it.

    Args:
        model: in eval mode, of nobody else.
        packed: the program's weights by the names of the layers they are of.
    """
    modules = dict(model.named_modules())
    for name, weights in packed.items():
        layer = _packed(modules[name], weights) if name in modules else None
        if layer is not None:
            model = with_submodule(model, name, layer)
    return model.requires_grad_(False)


def _packed(module: nn.Module, weights: Weights) -> PackedLayer | None:
    """The packed form of a Linear or Conv2d; None where the program has folded its weights, or cut channels."""
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or tuple(module.weight.shape) != weights.packed.shape:
        return None
    bias = torch.from_numpy(weights.bias)
    own: Tensor = torch.zeros_like(bias) if module.bias is None else module.bias
    if not torch.equal(own, bias) or not torch.equal(module.weight, weights.packed.unpack()):
        return None
    given = bias if module.bias is not None else None
    if isinstance(module, nn.Linear):
        return PackedLinear(weights.packed, given)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    geometry = (module.stride, module.padding, module.dilation)
    stride, padding, dilation = ((each[0], each[1]) for each in geometry)
    return PackedConv2d(weights.packed, given, stride, padding, dilation)
