"""What the attributes of an operation may be: types to declare them with, each with the check of a file's value.

An attribute is a field of the operation's class, declared with one of these types, or with ``Annotated[type, check]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from autoprune.repack.graph.activations import ACTIVATIONS

LARGEST = 2**31 - 1  # of any extent, stride or padding

Check = Callable[[Any], bool]
"""Whether a value, with tuples for a file's lists, is one that the attribute may have."""


@dataclass(frozen=True)
class Key:
    """The name of an attribute in files, where its field has another."""

    name: str


def integer(low: int, high: int = LARGEST) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def pair(low: int) -> Check:
    fits = integer(low)
    return lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(fits, value))


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def one_of(names: Mapping[str, Any]) -> Check:
    return lambda value: isinstance(value, str) and value in names


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def is_rising(value: Any) -> bool:
    """Integers >= 0 that rise, one at least."""
    numbers = isinstance(value, tuple) and bool(value) and all(map(integer(0), value))
    return numbers and all(before < after for before, after in itertools.pairwise(value))


def is_shape(value: Any) -> bool:
    """Of a reshape: integers (-1 for the one that follows from the rest) and references."""

    def fine(extent: Any) -> bool:
        return integer(-1)(extent) or (isinstance(extent, dict) and len(extent) == 1 and is_text(extent.get("ref")))

    return isinstance(value, tuple) and all(map(fine, value)) and value.count(-1) <= 1


Pair = tuple[int, int]
Padding = Annotated[Pair, pair(0)]
Window = Annotated[Pair, pair(1)]  # a stride, dilation, kernel or extent
Count = Annotated[int, integer(0)]
Size = Annotated[int, integer(1)]
Flag = Annotated[bool, is_flag]
Number = Annotated[float, is_number]
Text = Annotated[str, is_text]
OptionalText = Annotated[str | None, optional(is_text)]
OptionalCount = Annotated[int | None, optional(integer(0))]
Named = Annotated[str, one_of(ACTIVATIONS)]
Fused = Annotated[str | None, optional(one_of(ACTIVATIONS))]  # an activation, where there is one
