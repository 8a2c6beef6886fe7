"""How ops slide over a map and how their work is cut."""

from __future__ import annotations

from dataclasses import dataclass

WIDEST_STRIDE = 4  # columns from one of a sliding window's outputs to the next
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

    @property
    def spans(self) -> tuple[int, int]:
        """Rows and columns from its first tap to its last, both counted."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1

    def outputs(self, height: int, width: int, ceil: bool = False) -> tuple[int, int]:
        """Height and width of the output; with `ceil` a last window may reach beyond the border, not begin there."""

        def count(size: int, span: int, step: int, pad: int) -> int:
            windows = (size + 2 * pad - span + (step - 1 if ceil else 0)) // step + 1
            return windows - (ceil and (windows - 1) * step >= size + pad)

        high, wide = map(count, (height, width), self.spans, self.stride, self.padding)
        return high, wide

    def margin(self, size: tuple[int, int], outputs: tuple[int, int]) -> tuple[int, int]:
        """How far outputs look beyond a map of `size`: rows and columns, on the side where it is more."""

        def beyond(size: int, windows: int, span: int, step: int, pad: int) -> int:
            return max(pad, (windows - 1) * step + span - size - pad)

        rows, columns = map(beyond, size, outputs, self.spans, self.stride, self.padding)
        return rows, columns


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
        whole: of a weight of bytes: channels that a group keeps of four neighbours for them to be read as they lie;
            others are put together four by four. 1: all are read as they lie.
        tiles: whether a weight of bytes is multiplied in tile registers (AMX), on a target that has them.
    """

    group_size: int = 0
    block: int = 192
    chunk: int = 0
    inputs_first: bool = True
    panel: int = 0
    serpentine: bool = False
    columns: bool = False
    whole: int = 1
    tiles: bool = False

    def cut(
        self, positions: int, groups: int, batch: int, lanes: int, most: int | None = None
    ) -> tuple[dict[str, int], int]:
        """How a packed convolution's work is cut into items.

        Args:
            positions: of an image.
            groups: of filters.
            batch: images.
            lanes: of a vector; a block is whole vectors, but for the last.
            most: positions that a block may have, about; all when None.

        Returns:
            The fields that tell a kernel, by name, and how many items there are.
        """
        block = -(-min(self.block, positions if most is None else min(positions, most)) // lanes) * lanes
        chunk = min(self.chunk or groups, groups)
        # a last block of less than a vector is part of the one before: its positions may be taken singly
        blocks, chunks = max(1, (positions - lanes) // block + 1), -(-groups // chunk)
        if self.inputs_first:
            strides = {"CHUNK_STRIDE": 1, "BLOCK_STRIDE": chunks, "IMAGE_STRIDE": chunks * blocks}
        else:
            strides = {"BLOCK_STRIDE": 1, "IMAGE_STRIDE": blocks, "CHUNK_STRIDE": blocks * batch}
        fields = {
            "GROUPS": groups, "POSITIONS": positions, "CHUNK": chunk, "BLOCK": block, "CHUNKS": chunks,
            "BLOCKS": blocks, "BATCH": batch, **strides,
        }  # fmt: skip
        return fields, batch * blocks * chunks
