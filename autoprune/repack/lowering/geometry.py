"""How ops slide over a map and how their work is cut."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_FLOATS = 16384  # of a map that an item of an element-wise op works on


@dataclass(frozen=True)
class Window:
    """How a convolution or pooling slides: pairs (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def taps(self) -> list[tuple[int, int]]:
        """What an output position (y, x) reads: (dy, dx) from input position (y * stride, x * stride)."""
        (kh, kw), (ph, pw), (dh, dw) = self.kernel, self.padding, self.dilation
        return [(y * dh - ph, x * dw - pw) for y in range(kh) for x in range(kw)]

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        return (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1


@dataclass(frozen=True)
class Tiling:
    """How a convolution's or Linear's work is cut into items.

    Attributes:
        group_size: filters in a packed group; 0: as the weight is packed.
        block: positions (or tokens) an item.
        chunk: groups an item; 0: all.
        inputs_first: whether the items of one block follow each other, so that the input stays in the cache; else
            those of one chunk, so that the weights do.
        panel: inputs that a group is done with, at all positions of an item, before the next ones; 0: all at once.
        serpentine: whether every other group walks its kept positions backwards, so that it begins with what the one
            before it has just read.
        columns: whether a recurrent weight is walked by column, those of zero states left out; by group else.
    """

    group_size: int = 0
    block: int = 192
    chunk: int = 0
    inputs_first: bool = True
    panel: int = 0
    serpentine: bool = False
    columns: bool = False
