"""One native op: its compiled function, its fields and how many items it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels.compiler import Kernel
from autoprune.repack.kernels.fields import Fields, Given

F = TypeVar("F", bound=Fields)


@dataclass(frozen=True)
class NativeOp:
    """One op of a sequence.

    Attributes:
        name: of the value it computes, for reports.
        kernel: what computes it.
        fields: its description.
        items: independent pieces of work.
        arrays: entry of `fields` -> the array that it tells the place of.
        keep: what else must stay in memory.
    """

    name: str
    kernel: Kernel
    fields: NDArray[np.int64]
    items: int
    arrays: Mapping[int, NDArray[Any]] = field(default_factory=dict)
    keep: tuple[Any, ...] = ()

    def moved(self, places: Mapping[int, int], own: int) -> NDArray[np.int64]:
        """Its fields as they must be elsewhere.

        Args:
            places: entry -> where the array that it tells the place of lies there, in bytes.
            own: where the fields will lie.
        """
        fields = self.fields.copy()
        for entry, place in places.items():
            by_address = self.fields[entry] == self.arrays[entry].ctypes.data  # others count from the fields on
            fields[entry] = place if by_address else place - own
        return fields

    def addresses(self) -> NDArray[np.int64]:
        """Its fields, with the addresses of all arrays."""
        return self.moved({entry: array.ctypes.data for entry, array in self.arrays.items()}, 0)


def op_of(name: str, kernel: Kernel, fields: type[F], given: Mapping[F, Given], items: int) -> NativeOp:
    """An op of `items` items that keeps the arrays among its fields.

    Args:
        name: of the value it computes.
        kernel: what computes it.
        fields: the kernel's declaration.
        given: its fields.
        items: independent pieces of work.

    Raises:
        TypeError: a field is missing, is another kernel's, or its value is of the wrong type.
    """
    arrays = {int(entry): value for entry, value in given.items() if isinstance(value, np.ndarray)}
    return NativeOp(name, kernel, fields.array(given), items, arrays)
