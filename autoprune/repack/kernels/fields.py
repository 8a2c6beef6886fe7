"""The parameters of a kernel: one declaration gives their numbers, the kernel's loads and the array it reads.

A kernel reads its parameters from an array of int64. A subclass of `Fields` says what each entry holds::

    class Field(Fields):
        X_SLOT = SLOT
        X_OFFSET = OFFSET  # of the first token
        RESIDUAL = PRESENCE.of("residual")
        RESIDUAL_SLOT = SLOT.of("residual")
        RESIDUAL_OFFSET = OFFSET.of("residual")
        WEIGHT = FLOAT32_ARRAY  # (features,)
        BORDER = NUMBER.at(38)  # where numbers are left out

The kernel begins with ``get = Field.load(builder, fields)``; who calls it fills ``Field.array({Field.X_SLOT: ...})``,
which raises an error for what is missing or of the wrong type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Any, Self, TypeVar

import llvmlite.ir as ir
import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels.ir import I64, at, const

Other = TypeVar("Other", bound="Fields")
Given = int | float | NDArray[Any]
"""What a field may be given as, see `Kind`."""


class Kind(Enum):
    """What a field holds, and so what it is given as."""

    SLOT = "a slot: an integer, 0 or larger"  # index into a call's base addresses; slot 0 holds 0
    OFFSET = "bytes from the slot's base, or with slot 0 a contiguous float32 array, which is read in its place"
    NUMBER = "an integer"
    FLOAT = "a float"  # held as the bits of a float32
    INT32_ARRAY = "a contiguous int32 array"  # arrays are held as the bytes from the fields' own array to theirs
    INT64_ARRAY = "a contiguous int64 array"
    FLOAT32_ARRAY = "a contiguous float32 array"
    PRESENCE = "nothing: it follows from the fields of its part"  # 1 where its part is given, else 0


_DTYPES: Mapping[Kind, np.dtype[Any]] = {
    Kind.OFFSET: np.dtype(np.float32),
    Kind.INT32_ARRAY: np.dtype(np.int32),
    Kind.INT64_ARRAY: np.dtype(np.int64),
    Kind.FLOAT32_ARRAY: np.dtype(np.float32),
}
"""Entries of the arrays that a kind takes."""

ARRAYS = frozenset(_DTYPES) - {Kind.OFFSET}
"""The kinds that are always arrays."""


@dataclass(frozen=True)
class Declaration:
    """How a field is declared.

    Attributes:
        kind: what it holds.
        part: fields of one part are given all together or not at all, then they are 0; None: it is always given.
        number: its entry of the array; None: the one after that of the field before it.
    """

    kind: Kind
    part: str | None = None
    number: int | None = None

    def of(self, part: str) -> Declaration:
        """The same, in an optional part."""
        return replace(self, part=part)

    def at(self, number: int) -> Declaration:
        """The same, at an entry that is not the next one."""
        return replace(self, number=number)


SLOT = Declaration(Kind.SLOT)
OFFSET = Declaration(Kind.OFFSET)
NUMBER = Declaration(Kind.NUMBER)
FLOAT = Declaration(Kind.FLOAT)
INT32_ARRAY = Declaration(Kind.INT32_ARRAY)
INT64_ARRAY = Declaration(Kind.INT64_ARRAY)
FLOAT32_ARRAY = Declaration(Kind.FLOAT32_ARRAY)
PRESENCE = Declaration(Kind.PRESENCE)


class Fields(IntEnum):
    """Base class of kernels' parameters: members are declared, and are the numbers of their entries.

    Attributes:
        part: the optional part it belongs to; None: it is always given.
        follows: whether it is never given, but follows from others.
    """

    part: str | None
    follows: bool

    def __new__(cls, declared: Declaration) -> Self:
        """A member, as it is declared.

        Raises:
            TypeError: a number that does not rise, or a presence of no part.
        """
        following = max(cls, default=-1) + 1
        number = following if declared.number is None else declared.number
        if number < following:
            raise TypeError(f"a field of {_kernel(cls)} has number {number} after {following - 1}: they must rise.")
        if declared.kind is Kind.PRESENCE and declared.part is None:
            raise TypeError(f"a field of {_kernel(cls)} tells the presence of no part.")
        member = int.__new__(cls, number)
        member._value_ = number
        return member

    def __init__(self, declared: Declaration) -> None:
        self._kind, self.part = declared.kind, declared.part
        self.follows = declared.kind is Kind.PRESENCE
        self._dtype = _DTYPES.get(declared.kind)
        self._is_array = declared.kind in ARRAYS

    @property
    def kind(self) -> Kind:
        """What it holds."""
        return self._kind

    @classmethod
    def load(cls, b: ir.IRBuilder, fields: ir.Value) -> dict[Self, ir.Value]:
        """All fields as the kernel finds them in its array: an i64 each, of arrays their addresses."""
        own, found = b.ptrtoint(fields, I64), {}
        for field in cls:
            value = b.load(at(b, fields, const(field)))
            found[field] = b.add(own, value) if field.kind in ARRAYS else value
        return found

    @classmethod
    def array(cls, given: Mapping[Self, Given]) -> NDArray[np.int64]:
        """The array that the kernel reads; it tells where those in `given` lie, which must be kept alive, as it must.

        It holds no address but of arrays given as an OFFSET: with the others it can be moved.

        Raises:
            TypeError: a field is missing, is another kernel's, or its value is of the wrong type.
        """
        for field in given:
            if not isinstance(field, cls):
                raise TypeError(f"{_kernel(cls)} has no field {field!r}.")
        every = tuple(cls)
        parts = {None, *(field.part for field in given)}
        if missing := [field for field in every if field.part in parts and not field.follows and field not in given]:
            names = ", ".join(f"{field.name} (of {field.part})" if field.part else field.name for field in missing)
            raise TypeError(f"{_kernel(cls)} is not given {names}.")
        values = np.zeros(every[-1] + 1, np.int64)  # they rise
        own = values.ctypes.data
        for field, value in given.items():
            values[field] = field.entry(value) - (own if field._is_array else 0)
        for field in every:
            if field.follows:
                values[field] = field.part in parts
        return values

    @classmethod
    def shared(cls, given: Mapping[Other, Given]) -> dict[Self, Given]:
        """What another kernel's fields are given as, for this kernel's fields of the same names.

        Raises:
            TypeError: there is none of that name, or it holds something else.
        """
        for field in given:
            own = cls.__members__.get(field.name)
            if own is None or (own.value, own.kind) != (field.value, field.kind):
                raise TypeError(f"{_kernel(cls)} has no field like {field.name} of {_kernel(type(field))}.")
        return {cls[field.name]: value for field, value in given.items()}

    def entry(self, value: Given) -> int:
        """A value as the int64 that stands for it; of an array its address.

        Raises:
            TypeError: a value of the wrong type.
        """
        kind = self.kind
        if isinstance(value, np.ndarray):
            if self._dtype is not None and value.dtype == self._dtype and value.flags.c_contiguous:
                return value.ctypes.data
            found = f"{'a' if value.flags.c_contiguous else 'a scattered'} {value.dtype} array"
        elif kind is Kind.FLOAT and isinstance(value, float):
            return float_bits(value)
        elif kind in (Kind.SLOT, Kind.OFFSET, Kind.NUMBER) and isinstance(value, int | np.integer):
            if kind is not Kind.SLOT or value >= 0:
                return int(value)
            found = str(value)
        else:
            found = repr(value)
        raise TypeError(f"{_kernel(type(self))}'s field {self.name} takes {kind.value}, not {found}.")


def _kernel(fields: type[Fields]) -> str:
    """What errors call it."""
    return f"{fields.__module__.rpartition('.')[2]}.{fields.__name__}"


def float_bits(value: float) -> int:
    """The bits of a float32, as the integer they are."""
    return int(np.float32(value).view(np.int32))
