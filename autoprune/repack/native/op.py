"""One native op: its compiled function, its fields and how many items it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
