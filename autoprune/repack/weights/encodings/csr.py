"""Compressed sparse rows: where each row begins, and the column of each kept cell."""

from __future__ import annotations

import numpy as np

from autoprune.errors import FileError
from autoprune.repack.weights.encodings.base import Bytes, Cells, Encoding, Indices, smallest_unsigned


class Csr(Encoding):
    """Pointers, then columns, each in the smallest unsigned type that holds them."""

    def bits(self, cells: Cells) -> int:
        pointer, column = self._types(cells.columns, len(cells.kept))
        return 8 * ((cells.rows + 1) * pointer.itemsize + len(cells.kept) * column.itemsize)

    def encode(self, cells: Cells) -> Bytes:
        pointer, column = self._types(cells.columns, len(cells.kept))
        parts = cells.pointer.astype(pointer), cells.column.astype(column)
        return np.concatenate([part.view(np.uint8) for part in parts])

    def _decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Indices:
        pointer_type, column_type = self._types(columns, count)
        middle = (rows + 1) * pointer_type.itemsize
        if len(stream) != middle + count * column_type.itemsize:
            raise FileError(f"compressed rows have {len(stream)} bytes")
        pointer = stream[:middle].view(pointer_type).astype(np.int64)
        column = stream[middle:].view(column_type)
        kept = np.diff(pointer)
        if pointer[0] != 0 or pointer[-1] != count or bool((kept < 0).any()):
            raise FileError("compressed rows do not begin where the last ones end")
        if count and int(column.max()) >= columns:
            raise FileError("a column of compressed rows is out of range")
        return column + np.repeat(np.arange(rows, dtype=np.int64) * columns, kept)

    @staticmethod
    def _types(columns: int, count: int) -> tuple[np.dtype[np.unsignedinteger], np.dtype[np.unsignedinteger]]:
        return smallest_unsigned(count), smallest_unsigned(max(0, columns - 1))
