"""The torch operators of a graph: looked up by name, among those `allowed`, and their arguments as JSON."""

from __future__ import annotations

import functools
import math
import operator as operator_module
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.allowed import fault, is_allowed

# What torch and unpacking raise for values that do not fit an operation; a graph from a file may hold any.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)

_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


def operator_name(operator: torch._ops.OpOverload) -> str:
    """``aten.softmax.int`` and the like."""
    return str(operator)


@functools.lru_cache(maxsize=512)
def resolve(name: str) -> torch._ops.OpOverload:
    """Returns the operator called e.g. ``aten.softmax.int``; raises FileError unless it is allowed."""
    parts = name.split(".")
    refused = FileError(f"the operator {name!r} is not one that a graph may hold.")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        raise refused
    packet = getattr(torch.ops.aten, parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or parts[2] not in packet.overloads():
        raise refused
    operator = getattr(packet, parts[2])
    if not isinstance(operator, torch._ops.OpOverload) or not is_allowed(operator):
        raise refused
    return operator


def encode_number(value: float) -> Any:
    """A float as JSON, which knows no infinity."""
    return value if math.isfinite(value) else {"float": repr(float(value))}


def encode_dtype(dtype: torch.dtype) -> str:
    """Raises KeyError for a type no graph holds, such as a complex one."""
    return {value: name for name, value in _DTYPES.items()}[dtype]


def decode_dtype(name: object) -> torch.dtype:
    """``float32`` and the like; raises FileError for anything else."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise FileError(f"{name!r} is no element type of a graph.")
    return _DTYPES[name]


def decode(value: Any, values: Mapping[str, Any]) -> Any:
    """Turns an encoded argument into what the operator takes; ``{"ref": name}`` is looked up in `values`."""
    if isinstance(value, (list, tuple)):
        return [decode(each, values) for each in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "ref":
        return values[content]
    return float(content) if tag == "float" else decode_dtype(content)


_FLOATS = ("inf", "-inf", "nan")


def check_encoded(value: Any, what: str) -> None:
    """Raises FileError unless `value` is a well-formed encoded argument."""
    if isinstance(value, (list, tuple)):
        for each in value:
            check_encoded(each, what)
    elif isinstance(value, dict):
        tag, content = next(iter(value.items())) if len(value) == 1 else ("", None)
        fine = {"ref": isinstance(content, str), "float": content in _FLOATS, "dtype": isinstance(content, str)}
        if not fine.get(tag, False):
            raise FileError(f"{what} holds the argument {value!r}.")
        if tag == "dtype":
            decode_dtype(content)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise FileError(f"{what} holds the argument {value!r}.")
    elif type(value) is float and not math.isfinite(value):
        raise FileError(f"{what} holds the number {value!r}.")


_ENUMERATED = ("Layout", "MemoryFormat", "Device", "Generator", "Stream", "Storage")  # of arguments no file gives


def check_arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> None:
    """Raises FileError where an operator would be given a number, or a value, for an element type or the like.

    torch takes a number for the enumerator with that number without looking whether there is one.
    """
    arguments = resolve(name)._schema.arguments
    named = {argument.name: argument for argument in arguments}
    given = [*zip((argument for argument in arguments if not argument.kwarg_only), args, strict=False)]
    given += [(named[key], value) for key, value in kwargs.items() if key in named]
    for argument, value in given:
        kind, is_type = str(argument.real_type), isinstance(value, dict) and "dtype" in value
        allowed = is_type if "ScalarType" in kind else not is_type
        if any(each in kind for each in _ENUMERATED):
            allowed = False
        if value is not None and not allowed:
            raise FileError(f"{what} holds {value!r} for {argument.name!r}.")
    if reason := fault(name, {argument.name: value for argument, value in given}):
        raise FileError(f"{what} {reason}.")


def is_mask(index: Any) -> bool:
    """Whether a tensor that is given as an index tells by true and false what is picked."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def references(value: Any) -> list[str]:
    """The names an encoded argument refers to, in order."""
    if isinstance(value, (list, tuple)):
        return [name for each in value for name in references(each)]
    if isinstance(value, dict) and isinstance(value.get("ref"), str):
        return [value["ref"]]
    return []


def renamed(value: Any, old: str, new: str) -> Any:
    """An encoded argument that refers to `new` where it referred to `old`."""
    if isinstance(value, (list, tuple)):
        return [renamed(each, old, new) for each in value]
    return {"ref": new} if value == {"ref": old} else value


def bind(
    name: str, args: Any, kwargs: Mapping[str, Any], item: int | None, fixed: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], Any]:
    """`call` made ready for many calls on the CPU: values -> result, where those of `fixed` are the same in each."""
    operator = resolve(name)
    given = {key: _bound(value, fixed) for key, value in kwargs.items()}
    if any(argument.name == "device" for argument in operator._schema.arguments):
        cpu = torch.device("cpu")
        given["device"] = lambda _: cpu
    places, named = [_bound(value, fixed) for value in args], list(given.items())

    def run(values: Mapping[str, Any]) -> Any:
        result = operator(*[each(values) for each in places], **{key: each(values) for key, each in named})
        return result if item is None else result[item]

    return run


def _bound(value: Any, fixed: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """An encoded argument as what gives it, decoded as far as `fixed` tells."""
    if all(name in fixed for name in references(value)):
        known = decode(value, fixed)
        return lambda _: known
    if isinstance(value, dict):
        return operator_module.itemgetter(value["ref"])
    parts = [_bound(each, fixed) for each in value]
    return lambda values: [each(values) for each in parts]


def call(name: str, args: Any, kwargs: Mapping[str, Any], values: Mapping[str, Any], item: int | None = None) -> Any:
    """Runs an allowed operator on encoded arguments; of several results it returns the one numbered `item`."""
    operator = resolve(name)
    given = {key: decode(value, values) for key, value in kwargs.items()}
    if any(argument.name == "device" for argument in operator._schema.arguments):  # real or meta, like the rest
        devices = (value.device for value in values.values() if isinstance(value, Tensor))
        given["device"] = next(devices, None)
    places = decode(args, values)
    if name == "aten.index.Tensor" and any(is_mask(each) for each in places[1]):
        raise TypeError("it picks by a mask: how many there are depends on values")
    if "upsample" in name and places[0].is_meta and not places[0].numel():  # torch's shapes for it fail on nothing
        result = operator(torch.empty(places[0].shape, dtype=places[0].dtype), *places[1:], **given).to("meta")
    else:
        result = operator(*places, **given)
    return result if item is None else result[item]
