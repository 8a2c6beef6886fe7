"""How a model uses its weights: which operators of torch multiply by them, seen while it runs.

No hook is set and no module is asked for its type: a weight that is read behind its module's back, or that is no
module's, is seen as any other. What stands between a parameter and the operator may turn it or scale it: zeros stay
zeros then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autoprune.model.copies import has_memory
from autoprune.model.recurrent.modules import run_stepwise
from autoprune.model.recurrent.names import cell_of
from autoprune.model.weights import layer_name


@dataclass(frozen=True)
class Use:
    """One call of an operator that multiplies its input by a weight.

    Attributes:
        kind: ``linear`` for products of matrices, or the name of the convolution.
        weight: as the operator multiplies by it: ``(out, in)``, or as torch's convolutions take it.
        turned: whether the parameter holds that the other way round: ``(in, out)``.
        x: what is multiplied.
        output: the product, bias included.
        bias: what is added to it, or None.
        settings: of a convolution, by name: ``stride``, ``padding``, ``dilation``, ``groups``.
        batch: in torch's attention, whose `x` is ``(steps, batch, in)`` or has these first two axes as one; else None.
    """

    kind: str
    weight: Tensor
    turned: bool
    x: Tensor
    output: Tensor
    bias: Tensor | None
    settings: Mapping[str, Any]
    batch: int | None = None

    @property
    def conv_groups(self) -> int:
        return int(self.settings.get("groups", 1))

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        """Kernel, stride, padding and dilation of a conv2d, or of a conv1d as one of height 1."""
        kernel = tuple(self.weight.shape[2:])
        parts = (kernel, *(self._setting(name) for name in ("stride", "padding", "dilation")))
        return tuple(
            (part[0], part[1]) if len(part) == 2 else (one, part[0]) for part, one in zip(parts, _HEIGHT_1, strict=True)
        )

    def _setting(self, name: str) -> tuple[int, ...]:
        """A convolution's ``stride``, ``padding`` or ``dilation``, one number for each axis of its kernel."""
        kernel = self.weight.shape[2:]
        value = self.settings[name]
        if name == "padding" and isinstance(value, str):
            dilation = self._setting("dilation")
            spans = [d * (k - 1) if value == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            return tuple(span // 2 for span in spans)
        numbers = (value,) if isinstance(value, int) else tuple(value)
        return numbers * len(kernel) if len(numbers) == 1 else numbers

    def by_sample(self, values: Tensor, samples: int) -> Tensor:
        """`x`, the output or its gradient with the samples of a batch on its first axis, as far as can be told."""
        if self.kind != "linear":
            return values
        if self.batch is not None:
            return values.reshape(-1, self.batch, values.shape[-1]).transpose(0, 1)
        if values.ndim == 2 and len(values) > samples and len(values) % samples == 0:
            return values.reshape(samples, -1, values.shape[-1])  # an operator that takes matrices alone
        return values


_HEIGHT_1 = (1, 1, 0, 1)  # kernel, stride, padding and dilation over the axis that a conv1d does not have

Seen = Callable[[str, Use], None]
Read = Callable[[str, str], None]  # name of a weight and of the function that reads it


@contextmanager
def watch_weights(
    model: nn.Module, names: Iterable[str] | None, seen: Seen, read: Read | None = None
) -> Iterator[None]:
    """Calls ``seen(name, use)`` after each product with a weight of the layers called `names`.

    A recurrent module one of whose weights is named runs a step at a time, so that each use of the weight is seen.

    Args:
        model: runs inside; its parameters stay where they are.
        names: of layers, see `layer_name`; None for all weights.
        seen: is given the layer's name and the use.
        read: called with the names of a layer and of a function that reads its weight and is no such product.
    """
    wanted = None if names is None else frozenset(names)
    weights = _Weights(model, wanted)
    recurrent = [
        (module, module.__dict__.get("forward"))
        for path, module in model.named_modules()
        if cell_of(module) is not None and any(weights.named(path, name) for name, _ in module.named_parameters())
    ]
    try:
        for module, _ in recurrent:
            module.forward = _stepwise(module)
        with _Watch(weights, seen, read):
            yield
    finally:
        for module, own in recurrent:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


def _stepwise(module: Any) -> Any:
    return lambda x, hx=None: run_stepwise(module, x, hx)


@dataclass(frozen=True)
class _Held:
    """What holds a weight: the parameter itself, or what was scaled from it, for as long as that lives."""

    name: str
    tensor: weakref.ref[Tensor]


class _Weights:
    """Finds the weight that a tensor is, or is a view of, or was scaled from."""

    def __init__(self, model: nn.Module, names: frozenset[str] | None) -> None:
        self._at: dict[int, _Held] = {}
        self._memory: dict[str, tuple[int, int]] = {}  # of each parameter: where it begins and ends
        for path, parameter in model.named_parameters():
            name = layer_name(path)
            if parameter.ndim > 1 and has_memory(parameter) and (names is None or name in names):
                self._memory[name] = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
                self.add(name, parameter)

    def add(self, name: str, tensor: Tensor) -> None:
        self._at[tensor.data_ptr()] = _Held(name, weakref.ref(tensor))

    def named(self, path: str, parameter: str) -> bool:
        return layer_name(f"{path}.{parameter}".lstrip(".")) in self._memory

    def find(self, value: object) -> tuple[str, Tensor] | None:
        """The layer's name, and the tensor that `value` is or is the whole of in another shape."""
        if not has_memory(value) or value.ndim < 2:
            return None
        held = self._at.get(value.data_ptr())
        tensor = None if held is None else held.tensor()
        if held is None or tensor is None or tensor.numel() != value.numel():
            return None
        return held.name, tensor

    def inside(self, value: object) -> str | None:
        """The layer whose parameter's memory a tensor lies in."""
        if not has_memory(value):
            return None
        at = value.data_ptr()
        return next((name for name, (begin, end) in self._memory.items() if begin <= at < end), None)


def _places(*names: str) -> Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]:
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}


_CONVOLUTION = _places("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = _places("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PRODUCT, _ADDED = _places("input", "matrix"), _places("bias", "input", "matrix")
_CONVOLUTIONS: Mapping[Any, tuple[str, Any]] = {
    functional.conv1d: ("conv1d", _CONVOLUTION),
    functional.conv2d: ("conv2d", _CONVOLUTION),
    functional.conv3d: ("conv3d", _CONVOLUTION),
    functional.conv_transpose1d: ("convtranspose1d", _TRANSPOSED),
    functional.conv_transpose2d: ("convtranspose2d", _TRANSPOSED),
    functional.conv_transpose3d: ("convtranspose3d", _TRANSPOSED),
}
_PRODUCTS: Mapping[Any, Any] = {
    functional.linear: _places("input", "weight", "bias"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm), _PRODUCT),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _ADDED),
}
_NUMBERS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_SCALING = {
    *(torch.mul, Tensor.mul, torch.div, Tensor.div, torch.clone, Tensor.clone, Tensor.contiguous),
    *(Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16),
}  # of a weight: what is 0 stays 0, and in its place


def _entered(function: Any) -> Any:
    """A function of torch that asks whether somebody watches, without that question: what it calls is seen then."""
    inner = {**function.__globals__, "has_torch_function": lambda _: False}
    copied = FunctionType(function.__code__, inner, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_attention = _entered(functional.multi_head_attention_forward)


class _Watch(TorchFunctionMode):
    def __init__(self, weights: _Weights, seen: Seen, read: Read | None) -> None:
        super().__init__()
        self.weights, self.seen, self.read = weights, seen, read
        self.batch: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is functional.multi_head_attention_forward:
            query = args[0] if args else given["query"]
            before, self.batch = self.batch, query.shape[1] if query.ndim == 3 else 1
            try:
                with self:
                    return _attention(*args, **given)
            finally:
                self.batch = before
        output = func(*args, **given)
        call = self._product(func, args, given, output)
        if call is not None:
            self.seen(*call)
        elif self.read is not None or func in _SCALING:
            self._look(func, (*args, *given.values()), output)
        return output

    def _product(
        self, func: Any, args: tuple[Any, ...], given: Mapping[str, Any], output: Any
    ) -> tuple[str, Use] | None:
        if func in _CONVOLUTIONS:
            kind, places = _CONVOLUTIONS[func]
            bound = places(args, given)
            weight, settings = bound["weight"], {key: bound.get(key, value) for key, value in _NUMBERS.items()}
        elif func in _PRODUCTS:
            kind, bound, settings = "linear", _PRODUCTS[func](args, given), {}
            matrix = bound.get("matrix", bound.get("mat2", bound.get("other")))
            weight = bound.get("weight", matrix)
        else:
            return None
        found = self.weights.find(weight)
        if found is None or (kind == "linear" and weight.ndim != 2):
            return None
        name, held = found
        as_read = weight if kind != "linear" or "weight" in bound else weight.t()
        turned = _is_turned(as_read, held)
        if turned is None:
            return None
        x = bound.get("input", bound.get("mat1"))
        bias = bound.get("bias")
        return name, Use(kind, as_read, turned, x, output, bias, settings, self.batch)

    def _look(self, func: Any, given: tuple[Any, ...], output: Any) -> None:
        """A function that is no product: it gives a view of a weight, the weight scaled, or what was made of it."""
        results = [value for value in _flat((output,)) if isinstance(value, Tensor)]
        if not results:
            return
        for value in _flat(given):
            found = self.weights.find(value)
            if found is not None and _scales(func, given, value) and results[0].shape == found[1].shape == value.shape:
                if self.weights.find(results[0]) is None:  # else it is the same tensor
                    self.weights.add(found[0], results[0])
                continue
            name = found[0] if found is not None else self.weights.inside(value)
            views = name is not None and all(self.weights.inside(each) == name for each in results)
            if name is not None and not views and self.read is not None:
                part = " of a part" if found is None else ""
                self.read(name, f"{getattr(func, '__name__', func)}{part}")


def _scales(func: Any, given: tuple[Any, ...], value: Tensor) -> bool:
    """Whether what is 0 in `value`, an argument, stays 0 in the result: not in what divides."""
    return func in _SCALING and (func not in (torch.div, Tensor.div) or value is given[0])


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _is_turned(weight: Tensor, held: Tensor) -> bool | None:
    """Whether `held` is `weight` the other way round; None where it is neither that nor the same."""
    if weight.shape == held.shape and weight.stride() == held.stride():
        return False
    turned = weight.ndim == 2 and weight.shape == held.t().shape and weight.stride() == held.t().stride()
    return True if turned else None
