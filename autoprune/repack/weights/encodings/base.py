"""What an encoding is given and must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import FileError

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Which cells of a grid are kept.

    Attributes:
        rows: of the grid: groups of filters that share their positions, or single filters.
        columns: positions of a row.
        kept: the kept cells ``row * columns + column``, rising.
    """

    rows: int
    columns: int
    kept: Indices

    @cached_property
    def pointer(self) -> Indices:
        """``(rows + 1,)``; row r keeps ``kept[pointer[r]:pointer[r + 1]]``."""
        return np.searchsorted(self.kept, np.arange(self.rows + 1, dtype=np.int64) * self.columns)

    @property
    def column(self) -> Indices:
        """Of each kept cell."""
        first = np.arange(self.rows, dtype=np.int64) * self.columns
        return self.kept - np.repeat(first, np.diff(self.pointer))


class Encoding(ABC):
    """Kept cells as bytes and back. A decoder takes nothing on trust: bytes come from files."""

    @abstractmethod
    def bits(self, cells: Cells) -> int | None:
        """What `encode` takes, exactly, before the last byte is filled up; None where these cells cannot be encoded."""

    @abstractmethod
    def encode(self, cells: Cells) -> Bytes:
        """``ceil(bits / 8)`` bytes."""

    @abstractmethod
    def _decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Indices:
        """What `encode` made of `count` kept cells; of other bytes anything, or a FileError.

        Allocates no more than a few times what the stream and `count` account for.
        """

    def decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Cells:
        """The cells that were encoded.

        Args:
            stream: all bytes of `encode`.
            rows: of the grid.
            columns: likewise.
            count: of the kept cells; the caller holds a value for each, or it may be anything.

        Raises:
            FileError: the bytes are no encoding of that many cells of such a grid.
        """
        kept = self._decode(stream, rows, columns, count)
        if len(kept) != count:
            raise FileError(f"{len(kept)} positions are encoded, not {count}")
        if count and not (kept[0] >= 0 and kept[-1] < rows * columns and bool((kept[1:] > kept[:-1]).all())):
            raise FileError("encoded positions do not rise within their grid")
        return Cells(rows, columns, kept)


def smallest_unsigned(largest: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds `largest`; little-endian."""
    return next(np.dtype(kind) for kind in ("<u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(kind).max)
