"""The read-only data of a built model: weights, constants, and the fields of its ops, wherever they come to lie."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.repack.native.op import NativeOp

LINE = 64  # bytes that every array begins at a multiple of


class Image:
    """Bytes that hold each array once. Fields in it tell arrays by their distance, so that it needs no relocation."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._places: dict[bytes, int] = {}
        self._digest = hashlib.sha256()

    @property
    def data(self) -> bytes:
        """All of it."""
        return b"".join(self._pieces)

    @property
    def digest(self) -> str:
        """Of all of it."""
        return self._digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def put(self, array: NDArray[Any]) -> int:
        """Where an array lies, in bytes: where an equal one lies already, else at the end."""
        held = np.ascontiguousarray(array)
        data = held.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._places[key] = self._append(data)
        return self._places[key]

    def put_op(self, op: NativeOp) -> int:
        """Where the fields of an op lie, whose arrays are put beside them; those of OFFSETs count from the image on."""
        places = {entry: self.put(array) for entry, array in op.arrays.items()}
        own = self._size
        return self._append(op.moved(places, own).tobytes())

    def _append(self, data: bytes) -> int:
        place = self._size
        padded = data + bytes(-len(data) % LINE)
        self._pieces.append(padded)
        self._digest.update(padded)
        self._size += len(padded)
        return place
