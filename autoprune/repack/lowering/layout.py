"""Where a value lies in memory: feature maps with a zero border kept around them, tokens as plain rows.

A map's rows are `pitch` floats apart, and the columns beyond its width are its right border and the next row's left
one; the rows above the first of a channel are its top border and the bottom one of the channel before. So a
neighbour of any position lies a constant distance away, inside the border where the map ends.

A map read with a stride is stored as phase planes: padded position (y, x) in plane (y mod s, x mod s), where what
neighbouring outputs read are neighbours again.

Where a map is small, border columns are much to compute for nothing. It has none then (`pad_w` is 0), and who looks
beyond a row's ends does so through a mask (`inside`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import AutopruneError

ALIGN = 16  # floats: a cache line, the widest vector
FLOAT_BYTES = 4
SLACK = 16 * ALIGN  # floats behind a map, which tiles may read
LONG_FLOATS = 2  # an int64, or an address, is as long as two floats


def floats_of(entries: int, size: int) -> int:
    """Floats that so many entries of `size` bytes take."""
    return -(-entries * size // FLOAT_BYTES)


def aligned(floats: int) -> int:
    return -(-floats // ALIGN) * ALIGN


def _spread(floats: int) -> int:
    """An odd number of cache lines: so far apart, the same position of many channels meets every set of a cache."""
    return floats + ALIGN if floats // ALIGN % 2 == 0 else floats


@dataclass(frozen=True)
class MapLayout:
    """A feature map (N, C, H, W) in memory; all sizes in floats.

    Attributes:
        channels: of one image.
        height, width: of the image, its border not counted.
        pitch: from a row to the next; in a phase plane, of the plane.
        pad_h, pad_w: border rows and columns that may be read; the border's value is 0, or `border`.
        stride_h, stride_w: 1, or the number of phases.
        border: what lies around the map.
        reach: columns beyond a row's ends that are looked at, and masked, beside the border's.
    """

    channels: int
    height: int
    width: int
    pitch: int
    pad_h: int = 0
    pad_w: int = 0
    stride_h: int = 1
    stride_w: int = 1
    border: float = 0.0
    reach: int = 0

    @property
    def phases(self) -> int:
        return self.stride_h * self.stride_w

    @property
    def rows(self) -> int:
        """Of one plane, its own border counted, the one it shares with the next plane not."""
        if self.phases == 1:
            return self.height + self.pad_h
        return -(-(self.height + 2 * self.pad_h) // self.stride_h)

    @property
    def plane(self) -> int:
        """From a plane to the next; whole vectors written from the last row's positions stay inside."""
        before = self.positions - self.width if self.phases == 1 else (self.rows - 1) * self.pitch
        return _spread(aligned(max(self.rows * self.pitch, before + aligned(self.pitch))))

    @property
    def origin(self) -> int:
        """Position (0, 0) of channel 0, aligned to a vector."""
        border = self.pad_h * self.pitch + self.pad_w if self.phases == 1 else 0
        return aligned(border + self.reach)

    @property
    def image(self) -> int:
        """From an image to the next."""
        return self.channel(self.channels)

    def size(self, batch: int) -> int:
        """Floats of the whole buffer: room before the first row and behind the last for what a tile reads beyond."""
        return aligned(2 * self.origin + batch * self.image + self.pitch + SLACK)

    def channel(self, index: int) -> int:
        """From the origin to a channel's position (0, 0)."""
        return index * (self.plane if self.phases == 1 else _spread(self.phases * self.plane))

    def tap(self, dy: int, dx: int) -> int:
        """From a position of a channel's result to what lies (dy, dx) from it in the (padded) input, floats.

        `dy` and `dx` count from the image's position (0, 0); an output position (y, x) stands for input position
        (y * stride_h, x * stride_w).
        """
        if self.phases == 1:
            return dy * self.pitch + dx
        y, x = dy + self.pad_h, dx + self.pad_w
        plane = y % self.stride_h * self.stride_w + x % self.stride_w
        return plane * self.plane + y // self.stride_h * self.pitch + x // self.stride_w

    def check_windows(self, out: MapLayout, stride: tuple[int, int], taps: list[tuple[int, int]]) -> None:
        """Raises AutopruneError where windows that slide row by row, whole rows of `out`'s pitch, would leave the map.

        That is where readers of `out` want a border far wider than its vectors.
        """
        step = (1, 1) if self.phases > 1 else stride
        columns = aligned(out.pitch)
        last = (out.height - 1) * step[0] * self.pitch + max(self.tap(dy, dx) for dy, dx in taps) + columns * step[1]
        room = self.channel(1) + self.origin + self.pitch + SLACK
        if last > room or (out.height - 1) * out.pitch + columns > len(out.mask()):
            raise AutopruneError(
                f"a map of {out.width} columns is read with a border of {out.pad_w}: there is no room for so much."
            )

    @property
    def positions(self) -> int:
        """Flat positions from (0, 0) to the last of a channel, those on the border between rows counted."""
        return (self.height - 1) * self.pitch + self.width

    @property
    def behind(self) -> int:
        """Floats of border behind the last position of a channel, before the next channel's first."""
        return self.plane - self.positions if self.pad_h or self.pad_w else 0

    @property
    def before(self) -> int:
        """Floats of border before the first channel."""
        return self.pad_h * self.pitch + self.pad_w

    def mask(self) -> NDArray[np.int32]:
        """-1 inside the map, 0 on its border, for every flat position and the width of a tile beyond."""
        mask = np.zeros(aligned(self.positions) + SLACK, np.int32)
        inside = np.arange(self.pitch) < self.width
        rows = np.tile(inside, self.height)[: self.positions]
        mask[: self.positions] = -rows.astype(np.int32)
        return mask

    def inside(self, width: int, column: int, count: int) -> NDArray[np.int32]:
        """For the first `count` positions of outputs of a `width`: -1 where what lies `column` beside is in the map."""
        x = np.arange(self.pitch)
        source = x * self.stride_w + column
        row = (x < width) & (source >= 0) & (source < self.width)
        return -np.resize(row, count).astype(np.int32)
