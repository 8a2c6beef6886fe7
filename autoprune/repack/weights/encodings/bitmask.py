"""One bit a cell."""

from __future__ import annotations

import numpy as np

from autoprune.errors import FileError
from autoprune.repack.weights.encodings.base import Bytes, Cells, Encoding, Indices


class Bitmask(Encoding):
    """The first cell is the highest bit of the first byte."""

    def bits(self, cells: Cells) -> int:
        return cells.rows * cells.columns

    def encode(self, cells: Cells) -> Bytes:
        mask = np.zeros(cells.rows * cells.columns, np.bool_)
        mask[cells.kept] = True
        return np.packbits(mask)

    def _decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Indices:
        if len(stream) != -(-rows * columns // 8):
            raise FileError(f"a bitmask has {len(stream)} bytes")
        return np.flatnonzero(np.unpackbits(stream, count=rows * columns).view(np.bool_))
