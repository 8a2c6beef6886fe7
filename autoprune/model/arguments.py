"""What a model is called with."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn, strided

from autoprune.errors import AutopruneError


class Arguments:
    """The arguments of one call of a model: ``Arguments(x, mask=mask)`` for ``model(x, mask=mask)``.

    Wherever example inputs, or the inputs of a batch, are asked for, a tensor is the one argument, a tuple (or list)
    holds positional arguments, a mapping keyword arguments, and this is for both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, inputs: Any) -> Arguments:
        """What `inputs`, in any of the forms above, means."""
        if isinstance(inputs, Arguments):
            return inputs
        if isinstance(inputs, Mapping):
            if unnamed := [key for key in inputs if not isinstance(key, str)]:
                raise AutopruneError(
                    f"a mapping of inputs holds keyword arguments, whose names are strings, not {unnamed[0]!r}."
                )
            return cls(**inputs)
        return cls(*inputs) if isinstance(inputs, (tuple, list)) else cls(inputs)

    def call(self, model: Callable[..., Any]) -> Any:
        """What the model returns."""
        return model(*self.args, **self.kwargs)

    def of_samples(self, count: int) -> Arguments:
        """The same call with the first `count` samples of each tensor."""
        return self.with_tensors([x[:count] if x.dim() else x for x in self.tensors])

    def ordered(self, model: nn.Module) -> Arguments:
        """The same call with its arguments in the order of the model's parameters, by place where that can be."""
        try:
            bound = inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):  # the call says better what is wrong
            return self
        return Arguments(*bound.args, **bound.kwargs)

    def positional(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The same call by place alone, for what times and compares engines.

        Raises:
            AutopruneError: it cannot be, or there are arguments that are no dense tensors.
        """
        ordered = self.ordered(model)
        tensors = all(isinstance(value, Tensor) and value.layout is strided for value in ordered.args)
        if ordered.kwargs or not ordered.args or not tensors:
            raise AutopruneError(
                f"example inputs must here be dense tensors that the model takes by place, not {self!r}. Wrap the "
                "model in a module whose forward takes the tensors and calls it; repack and export_onnx take any "
                "arguments."
            )
        return ordered.args

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those in it, in order; in lists, tuples, dictionaries and dataclasses too."""
        return tuple(_tensors([*self.args, *self.kwargs.values()]))

    @property
    def samples(self) -> int:
        """The first extent of the first tensor; 0 without one."""
        first = next(iter(self.tensors), None)
        return 0 if first is None or not first.dim() else len(first)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Arguments:
        """The same call with other tensors in the places of `tensors`."""
        others = iter(tensors)
        args = [_replaced(value, others) for value in self.args]
        return Arguments(*args, **{name: _replaced(value, others) for name, value in self.kwargs.items()})

    def by_place(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model as a function of `tensors` alone."""
        return lambda *tensors: self.with_tensors(tensors).call(model)

    def __repr__(self) -> str:
        given = [*map(_described, self.args), *(f"{name}={_described(x)}" for name, x in self.kwargs.items())]
        return f"Arguments({', '.join(given)})"


def call_with(model: Callable[..., Any], inputs: Any) -> Any:
    """Calls a model with `inputs` in any form that `Arguments` takes."""
    return Arguments.of(inputs).call(model)


def prediction(output: Any) -> Any:
    """The tensor of a model's output that answers; the output itself where it holds none.

    That is the output where it is a tensor, else what it holds at ``logits``, else the first tensor in it that is not
    a single number, as a loss is.
    """
    if isinstance(output, Tensor):
        return output
    held = inside(output) or {}
    if isinstance(held.get("logits"), Tensor):
        return held["logits"]
    return next((x for x in _tensors(output) if x.dim() and x.is_floating_point()), output)


def inside(value: Any) -> dict[Any, Any] | None:
    """What a list, tuple, dictionary, dataclass or `is_state` holds, by index, key or name; None for anything else."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(vars(value)) if is_state(value) else None


FIXED = (torch.dtype, torch.device, type)
"""What an `is_state` may hold beside data, which is no data itself."""


def is_state(value: Any) -> bool:
    """Whether it is an object that only holds data, however deep, such as the cache of a decoder's keys and values."""
    held = isinstance(value, (Mapping, tuple, list)) or dataclasses.is_dataclass(value)  # by keys, places or fields
    return not held and _has_attributes(value) and _is_data(value, ())


def _has_attributes(value: Any) -> bool:
    kept = isinstance(value, (Tensor, nn.Module, Enum, BaseException, *FIXED))
    return hasattr(value, "__dict__") and not kept and not callable(value)


def _is_data(value: Any, within: tuple[int, ...]) -> bool:
    if value is None or isinstance(value, (Tensor, bool, int, float, str, *FIXED)):
        return True
    if id(value) in within:  # it holds itself
        return False
    if isinstance(value, (tuple, list)):
        held: Iterable[Any] = value
    elif isinstance(value, Mapping):
        held = value.values()
    elif _has_attributes(value):
        held = vars(value).values()
    else:
        return False
    return all(_is_data(each, (*within, id(value))) for each in held)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for each in (inside(value) or {}).values():
            yield from _tensors(each)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    held = inside(value)
    if held is None:
        return value
    made = {key: _replaced(each, tensors) for key, each in held.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(*made.values()) if hasattr(value, "_fields") else type(value)(made.values())
    if type(value) in (dict, OrderedDict):
        return type(value)(made)
    other = copy.copy(value)
    for key, each in made.items():
        if isinstance(value, Mapping):
            other[key] = each
        else:
            object.__setattr__(other, key, each)
    return other


def _described(value: Any) -> str:
    return f"<tensor of {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)
