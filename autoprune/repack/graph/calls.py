"""How a program is called and what it returns: a user's own arguments and containers around a graph's tensors.

A graph takes tensors by place and returns them in a structure of lists, tuples, dictionaries and records, plain JSON.
Here are the ways between that and what the user's model takes and returns.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.model.arguments import FIXED, Arguments, inside, is_state
from autoprune.model.copies import out_of_reach
from autoprune.repack.graph.ir import structure_names
from autoprune.repack.graph.record import Record
from autoprune.repack.graph.schema import check_outputs
from autoprune.repack.graph.torch_export import CaptureError

_CONTAINERS: dict[type, str] = {tuple: "tuple", list: "list", dict: "dict", OrderedDict: "ordered"}
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "place",
    inspect.Parameter.VAR_POSITIONAL: "place",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "either",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "keyword",
}


def structure(value: Any, leaf: Callable[[Any], str], does: str) -> Any:
    """A value as `Graph.outputs` describes it; its tensors as the names that `leaf` gives them.

    Raises:
        CaptureError: it holds what no program can; `does` is what the model does with it.
    """
    if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return leaf(value)
    if isinstance(value, np.generic) and does == "takes":
        value = value.item()
    if isinstance(value, str):
        return {"text": value}
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    fields = _fields(value)
    held = inside(value) if fields is None else fields
    if held is None or not all(type(key) in (str, int) for key in held):
        raise CaptureError(f"the model {does} a {type(value).__name__}, which a program cannot hold.")
    state = is_state(value)
    pairs = [
        [key, {"text": str(each)} if state and isinstance(each, FIXED) else structure(each, leaf, does)]
        for key, each in held.items()
    ]
    tag = "record" if fields is not None else _CONTAINERS.get(type(value), "dict")
    return {tag: [each for _, each in pairs] if tag in ("tuple", "list") else pairs}


def _fields(value: Any) -> dict[str, Any] | None:
    """Of a named tuple, a dataclass (as models' own output classes are) or another class of its own; else None."""
    if isinstance(value, Record) or is_state(value):
        return dict(vars(value))
    if isinstance(value, torch.Size):
        return {str(axis): extent for axis, extent in enumerate(value)}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None) or getattr(type(value), "__match_args__", None)
        return dict(zip(names, value, strict=False)) if names else None
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    return dict(value) if isinstance(value, Mapping) else inside(value)


def record_classes(value: Any) -> tuple[Callable[..., Any], ...]:
    """What makes the records and dictionaries in a value, outer ones first: their classes."""
    own: tuple[Callable[..., Any], ...] = ()
    if isinstance(value, defaultdict):
        own = (partial(defaultdict, value.default_factory),)
    elif is_state(value):
        own = (partial(_object, type(value), {k: each for k, each in vars(value).items() if isinstance(each, FIXED)}),)
    elif _fields(value) is not None or isinstance(value, Mapping):
        own = (type(value),)
    return own + tuple(kind for each in (inside(value) or {}).values() for kind in record_classes(each))


def restored(value: Any, classes: Iterator[Callable[..., Any]]) -> Any:
    """A result with the user's own classes in the places of its records."""
    if isinstance(value, Record):
        kind = next(classes)
        fields = {name: restored(each, classes) for name, each in vars(value).items()}
        if isinstance(kind, partial):
            return kind(fields)
        assert isinstance(kind, type)
        if issubclass(kind, tuple):
            return kind(*fields.values()) if hasattr(kind, "_fields") else kind(fields.values())
        if issubclass(kind, Mapping):
            return kind(**fields)
        return _object(kind, {}, fields)
    if isinstance(value, dict):
        kind = next(classes)
        return kind([(key, restored(each, classes)) for key, each in value.items()])
    return type(value)(restored(each, classes) for each in value) if isinstance(value, (tuple, list)) else value


def _object(kind: type, fixed: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """An object with these attributes: what the class does when one is made, it has done already."""
    made: Any = object.__new__(kind)
    for name, each in {**fields, **fixed}.items():
        object.__setattr__(made, name, each)
    return made


Place = tuple[int, int]
"""An input's number, and an axis of it."""


@dataclass
class Returned:
    """The structure of what a model returned."""

    structure: Any = None


class ByPlace(nn.Module):
    """A model called with its tensors alone, by place, and giving those of its output, in order.

    Args:
        model: of the user.
        arguments: how the user calls it.

    Raises:
        CaptureError: a part of it is out of reach.

    Attributes:
        returned: holds, after a call, the structure of the model's output, whose names are numbers of tensors.
        tied: groups of axes that have one extent, which torch.export takes for one where it is told.
    """

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        for name, (kind, why) in out_of_reach(model).items():
            raise CaptureError(f"the model holds {name!r} ({kind}), which cannot be captured: {why}.")
        self.model, self.arguments = model, arguments
        self.tied: Sequence[Sequence[Place]] = ()
        self.returned = Returned()  # torch.export takes back what is set on a module itself

    def forward(self, *tensors: Tensor) -> list[Any]:
        leaves: list[Any] = []

        def leaf(value: Any) -> str:
            leaves.append(value)
            return str(len(leaves) - 1)

        for (first, axis), *others in self.tied:
            for number, other in others:
                torch._check(tensors[first].shape[axis] == tensors[number].shape[other])
        output = self.arguments.with_tensors(tensors).call(self.model)
        self.returned.structure = structure(output, leaf, "returns")
        return leaves


def in_model(path: str) -> str:
    """A path in a `ByPlace` as one in its model."""
    return path.removeprefix("model").removeprefix(".")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model, as a program was made for it.

    Attributes:
        how: it is given: by ``place``, as ``keyword``, or ``either``.
        value: its structure; a name is that of one of the graph's inputs.
        needed: whether a call must give it.
    """

    name: str
    how: str
    value: Any
    needed: bool


@dataclass(frozen=True)
class Signature:
    """The parameters of a program, in the order of the model's own."""

    parameters: tuple[Parameter, ...]

    @cached_property
    def plain(self) -> bool:
        """Whether every parameter is a tensor that may be given by place, so that positions alone tell."""
        return all(isinstance(each.value, str) and each.how != "keyword" for each in self.parameters)

    @classmethod
    def of(cls, model: nn.Module, arguments: Arguments) -> Signature:
        """What a program of `model` takes that is made for such a call.

        Raises:
            CaptureError: the model does not take these arguments, or a program could not.
        """
        names = iter(input_names(model, arguments))
        found = []
        for name, kind, value, default in _bound(model, arguments):
            try:
                held = structure(value, lambda _: next(names), "takes")
            except CaptureError:
                if value is default:  # an object that nobody gives
                    continue
                raise
            plain = not list(structure_names(held))
            found.append(Parameter(name, _KINDS[kind], held, not (plain and _equal(value, default))))
        return cls(tuple(found))

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The graph's inputs from a call's arguments.

        Raises:
            AutopruneError: the program was made for other arguments.
        """
        places = [each.name for each in self.parameters if each.how != "keyword"]
        given = {**dict(zip(places, args, strict=False)), **kwargs}
        takes = {each.name for each in self.parameters if each.how != "place"}
        missing = [each.name for each in self.parameters if each.needed and each.name not in given]
        if len(args) > len(places) or kwargs.keys() & places[: len(args)] or kwargs.keys() - takes or missing:
            told = ", ".join([*(f"<{number}>" for number in range(len(args))), *kwargs]) or "nothing"
            taken = ", ".join(each.name for each in self.parameters) or "nothing"
            raise AutopruneError(f"this model takes {taken}, not {told}.")
        found: list[Tensor] = []
        for each in self.parameters:
            if each.name in given:
                _match(each.value, given[each.name], each.name, found)
        return found

    def to_json(self) -> list[Any]:
        return [[each.name, each.how, each.value, each.needed] for each in self.parameters]

    @classmethod
    def from_json(cls, data: Any, inputs: Sequence[str]) -> Signature:
        """Rebuilds one; raises FileError unless it is one of a graph with these inputs."""
        found = []
        for row in data if isinstance(data, list) else [None]:
            if not isinstance(row, list) or len(row) != 4:
                raise FileError(f"a parameter is {row!r}")
            name, how, value, needed = row
            if not isinstance(name, str) or how not in _KINDS.values() or not isinstance(needed, bool):
                raise FileError(f"a parameter is {row!r}")
            check_outputs(value)
            found.append(Parameter(name, how, value, needed or bool(list(structure_names(value)))))
        if [name for each in found for name in structure_names(each.value)] != list(inputs):
            raise FileError("its parameters are not the graph's inputs")
        if len({each.name for each in found}) < len(found):
            raise FileError("two parameters have one name")
        return cls(tuple(found))


def input_names(model: nn.Module, arguments: Arguments) -> list[str]:
    """What the tensors among the arguments are called: ``x``, or ``state.0`` and ``batch.mask`` inside of one."""
    return [path for name, _, value, _ in _bound(model, arguments) for path in _paths(name, value)]


def _paths(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield path
    else:
        for key, each in (inside(value) or {}).items():
            yield from _paths(f"{path}.{key}", each)


def _bound(model: nn.Module, arguments: Arguments) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, kind, value and default of each parameter; in the order of the arguments, where they are `ordered`."""
    declared = inspect.signature(model.forward)
    try:
        given = declared.bind(*arguments.args, **arguments.kwargs).arguments
    except TypeError as error:
        raise CaptureError(f"the model does not take these arguments: {error}.") from error
    for name, parameter in declared.parameters.items():
        value = given.get(name, parameter.default)
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            for number, each in enumerate(given.get(name, ())):
                yield f"{name}.{number}", parameter.kind, each, parameter.empty
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for key, each in given.get(name, {}).items():
                yield key, parameter.kind, each, parameter.empty
        elif value is not parameter.empty:
            yield name, parameter.kind, value, parameter.default


def _equal(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _match(held: Any, value: Any, name: str, found: list[Tensor]) -> None:
    """Adds the tensors of an argument, which must be built like the one that the program was made with."""
    if isinstance(held, str):
        if not isinstance(value, Tensor):
            raise AutopruneError(f"the argument {name} is a {type(value).__name__}, and was a tensor in the example.")
        found.append(value)
        return
    tag, content = next(iter(held.items())) if isinstance(held, dict) else ("", held)
    if tag in ("", "text"):
        value = str(value) if isinstance(value, FIXED) else value
        if isinstance(value, Tensor) or value != content:
            raise AutopruneError(
                f"the argument {name} is fixed in this program: {content!r}, as in the example inputs. Repack with "
                "another example to have it otherwise."
            )
        return
    if tag in ("tuple", "list"):
        fits = isinstance(value, (tuple, list)) and len(value) == len(content)
        parts = list(zip(range(len(content)), content, value, strict=True)) if fits else []
    else:
        inner = (_fields(value) if tag == "record" else None) or inside(value)
        fits = inner is not None and inner.keys() == {key for key, _ in content}
        parts = [(key, each, inner[key]) for key, each in content] if inner is not None and fits else []
    if not fits:
        raise AutopruneError(f"the argument {name} is built in another way than in the example inputs: {held!r}.")
    for key, each, part in parts:
        _match(each, part, f"{name}.{key}", found)
