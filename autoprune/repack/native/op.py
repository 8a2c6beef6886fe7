"""One native op: its compiled function, its fields and how many items it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels.fields import Fields, Given

F = TypeVar("F", bound=Fields)


@dataclass(frozen=True)
class NativeOp:
    """One op of a sequence.

    Attributes:
        name: of the value it computes, for reports.
        kernel: the native function's address.
        fields: its description.
        items: independent pieces of work.
        keep: what the addresses in `fields` point to.
    """

    name: str
    kernel: int
    fields: NDArray[np.int64]
    items: int
    keep: tuple[Any, ...] = ()


def op_of(name: str, kernel: int, fields: type[F], given: Mapping[F, Given], items: int) -> NativeOp:
    """An op of `items` items that keeps the arrays among its fields.

    Args:
        name: of the value it computes.
        kernel: the native function's address.
        fields: the kernel's declaration.
        given: its fields.
        items: independent pieces of work.

    Raises:
        TypeError: a field is missing, is another kernel's, or its value is of the wrong type.
    """
    arrays = tuple(value for value in given.values() if isinstance(value, np.ndarray))
    return NativeOp(name, kernel, fields.array(given), items, arrays)
