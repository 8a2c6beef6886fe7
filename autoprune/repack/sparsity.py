"""How sparse the weights are that a model computes with: masks and norms may stand between a parameter and its use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autoprune.masks import sparsity
from autoprune.model.inventory import watch_forward
from autoprune.model.weights import weighted_layers


def sparsities(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """The fraction of zeros in the weight of every layer, by name.

    That is the weight its forward hands to torch, else the parameter.

    Args:
        model: whose layers are meant.
        run: calls it once.
    """
    every = weighted_layers(model).items()
    layers = {name: layer for name, layer in every if isinstance(getattr(layer, "weight", None), Tensor)}
    found = {name: sparsity(layer.weight) for name, layer in layers.items()}  # type: ignore[arg-type]
    modules = [name for name, _ in model.named_modules() if name in layers]  # not the weights of an LSTM or GRU
    with torch.inference_mode(), _Weights() as given:

        def seen(name: str, args: tuple[Any, ...], output: Any) -> None:
            weight, given.last = given.last, None
            if weight is not None and weight.shape == layers[name].weight.shape:
                found[name] = sparsity(weight)

        with watch_forward(model, modules, seen):
            run()
    return found


class _Weights(TorchFunctionMode):
    """Remembers the last weight that a Linear or convolution was computed with."""

    last: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (functional.linear, functional.conv2d):
            weight = given["weight"] if "weight" in given else args[1]
            self.last = weight if isinstance(weight, Tensor) else None
        return func(*args, **given)
