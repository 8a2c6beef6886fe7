"""Every cell is kept: nothing to tell."""

from __future__ import annotations

import numpy as np

from autoprune.errors import FileError
from autoprune.repack.weights.encodings.base import Bytes, Cells, Encoding, Indices


class Full(Encoding):
    """No bytes at all, for a dense layer."""

    def bits(self, cells: Cells) -> int | None:
        return 0 if len(cells.kept) == cells.rows * cells.columns else None

    def encode(self, cells: Cells) -> Bytes:
        return np.empty(0, np.uint8)

    def decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Cells:
        return Cells(rows, columns, self._decode(stream, rows, columns, count))  # they rise, being counted

    def _decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Indices:
        if len(stream) or count != rows * columns:
            raise FileError("not every position is kept")
        return np.arange(count, dtype=np.int64)
