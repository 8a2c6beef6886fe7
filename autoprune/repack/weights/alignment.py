"""Arrays that begin at a cache line: what kernels read a vector at a time must not lie across two lines."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LINE_BYTES = 64

Entry = TypeVar("Entry", bound=np.generic)


def on_cache_lines(array: NDArray[Entry]) -> NDArray[Entry]:
    """The same array, contiguous and from a cache line on; copied where it is not."""
    if array.flags.c_contiguous and array.ctypes.data % LINE_BYTES == 0:
        return array
    room = np.empty(array.nbytes + LINE_BYTES, np.uint8)
    start = -room.ctypes.data % LINE_BYTES
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made
