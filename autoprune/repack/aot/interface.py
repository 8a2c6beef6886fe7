"""How a built model is called: its inputs and outputs, as C knows them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ir import Graph
from autoprune.repack.lowering.steps import Lowered, View

C_TYPES = {
    "float32": "float", "float64": "double", "int64": "int64_t", "int32": "int32_t", "int16": "int16_t",
    "int8": "int8_t", "uint8": "uint8_t", "bool": "uint8_t",
}  # fmt: skip
"""Type of a tensor's entries -> the type in C."""
_WORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl complex concept
    const const_cast consteval constexpr constinit continue decltype default delete do double dynamic_cast
    else enum explicit export extern false float for friend goto if inline int int16_t int32_t int64_t int8_t
    long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register
    reinterpret_cast requires restrict return short signed size_t sizeof static static_assert static_cast
    struct switch template this thread_local throw true try typedef typeid typename typeof uint8_t union
    unsigned using virtual void volatile wchar_t while xor xor_eq
    idle part parts workspace
    EOF I NULL assert errno linux stderr stdin stdout unix
"""
# Of C and C++, the functions' own parameters, and names that headers or compilers make macros of.
_TAKEN = frozenset(_WORDS.split())


@dataclass(frozen=True)
class Port:
    """A tensor that a built model reads or writes, contiguous.

    Attributes:
        name: of the parameter in C.
        dtype: of torch, such as ``float32``.
        shape: its extents.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def c_type(self) -> str:
        """The type of an entry in C."""
        return C_TYPES[self.dtype]

    @property
    def count(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of all entries."""
        return self.count * self.entry_bytes

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class Result:
    """An output: the value of the graph, its parameter in C, and where a call leaves it."""

    name: str
    port: Port
    view: View

    def of_samples(self, samples: int) -> Result:
        """Of so many samples side by side."""
        if samples == 1:
            return self
        first, *others = self.port.shape
        return replace(self, port=replace(self.port, shape=(samples * first, *others)))


def inputs_of(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> tuple[Port, ...]:
    """The parameters that are read, in the graph's order.

    Raises:
        AutopruneError: one of a type that C has no name for here.
    """
    taken: set[str] = set()
    ports = []
    for given, shape in zip(graph.inputs, shapes, strict=True):
        ports.append(_port(_unused(c_name(given.name), taken), given.dtype, shape))
    return tuple(ports)


def outputs_of(graph: Graph, lowered: Lowered, inputs: Sequence[Port]) -> tuple[Result, ...]:
    """The parameters that are written; every tensor once.

    They are named by the keys of the dictionaries and records that the model returns, else output, output_0, ...

    Raises:
        AutopruneError: one of a type that C has no name for here.
    """
    paths = dict(reversed(list(_paths(graph.outputs, ""))))  # of a tensor that stands in several places the first
    named = [name for name in dict.fromkeys(graph.output_names()) if name in lowered.returned]
    taken = {each.name.upper() for each in inputs}
    found = []
    for name in named:
        view = lowered.returned[name]
        dtype = str(lowered.values[name].dtype).removeprefix("torch.")
        path = paths[name] if len(named) > 1 or not paths[name].isdigit() else ""
        own = f"output_{path}" if path.isdigit() else path or "output"
        found.append(Result(name, _port(_unused(c_name(own), taken), dtype, view.shape), view))
    return tuple(found)


def shape_text(shape: Sequence[int]) -> str:
    """A shape as people write it."""
    return "x".join(map(str, shape)) or "one number"


def c_name(text: str) -> str:
    """A name that C takes, as like `text` as can be."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "x"
    return f"x_{name}" if name[0].isdigit() else f"{name}_" if name in _TAKEN else name


def _port(name: str, dtype: str, shape: tuple[int, ...]) -> Port:
    if dtype not in C_TYPES:
        raise AutopruneError(f"{name!r} is {dtype}: what is built takes and returns {', '.join(C_TYPES)}.")
    return Port(name, dtype, tuple(shape))


def _unused(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it that makes it new; constants of C have it in capitals."""
    found, number = name, 1
    while found.upper() in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found.upper())
    return found


def _paths(outputs: Any, path: str) -> Iterator[tuple[str, str]]:
    """(name of a value, the keys that lead to it)."""
    if isinstance(outputs, str):
        yield outputs, path or "0"
    elif isinstance(outputs, dict):
        ((tag, content),) = outputs.items()
        if tag in ("tuple", "list"):
            content = [(str(number), each) for number, each in enumerate(content)]
        if tag != "text":
            for key, each in content:
                yield from _paths(each, f"{path}_{key}".strip("_"))
