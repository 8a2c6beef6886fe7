"""The precisions that a model can be repacked in."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["float32", "int8", "mixed"]
"""``int8``: weights and activations in bytes wherever a layer can be; ``mixed``: where that costs little."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
