"""Steps from one kept cell to the next (after Deep Compression, Han et al. 2016)."""

from __future__ import annotations

import numpy as np

from autoprune.errors import ConfigError
from autoprune.repack.weights.encodings.base import Bytes, Cells, Encoding, Indices

STEP_BITS = (4, 8)


class Relative(Encoding):
    """One code a kept cell: how many cells are skipped before it, counted on from row to row.

    The largest code is a filler: it skips as many cells as its value and keeps none. Unlike Deep Compression's it holds
    no weight, so it costs its own bits alone.

    Args:
        bits: of a code, one of STEP_BITS.
    """

    def __init__(self, bits: int = 8) -> None:
        if bits not in STEP_BITS:
            raise ConfigError(f"encoding 'relative': bits must be one of {STEP_BITS}, not {bits!r}.")
        self._width, self._filler = bits, 2**bits - 1

    def bits(self, cells: Cells) -> int:
        return self._width * (len(cells.kept) + int((self._skipped(cells) // self._filler).sum()))

    def encode(self, cells: Cells) -> Bytes:
        skipped = self._skipped(cells)
        place = np.cumsum(skipped // self._filler + 1) - 1
        codes = np.full(int(place[-1]) + 1 if len(place) else 0, self._filler, np.uint8)
        codes[place] = skipped % self._filler
        if self._width == 8:
            return codes
        codes = np.append(codes, self._filler).astype(np.uint8) if len(codes) % 2 else codes
        packed: Bytes = np.bitwise_or(codes[::2] << 4, codes[1::2], dtype=np.uint8)
        return packed

    def _decode(self, stream: Bytes, rows: int, columns: int, count: int) -> Indices:
        codes = stream
        if self._width == 4:
            codes = np.empty(2 * len(stream), np.uint8)
            codes[::2], codes[1::2] = stream >> 4, stream & 15
        keeps = codes != self._filler
        skipped = np.cumsum(codes, dtype=np.int64)[keeps]
        kept: Indices = skipped + np.arange(len(skipped))
        return kept

    @staticmethod
    def _skipped(cells: Cells) -> Indices:
        """Cells left out before each kept one."""
        return np.diff(cells.kept, prepend=-1) - 1
