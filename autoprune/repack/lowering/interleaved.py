"""Values on a grid, as bytes: four neighbouring channels of a position in one lane of an interleaved map.

An interleaved map is a `Map` of lanes in place of floats, a quarter as many as there are channels. Rows of tokens are
one of a single row: a token a position. A value on a grid that is wanted as floats is made of its bytes, so that both
forms hold the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

from autoprune.quantization.grid import Grid
from autoprune.repack.graph.ops import Op, Quantize
from autoprune.repack.lowering import byte_nodes
from autoprune.repack.lowering.buffers import Buffer, StridedRef
from autoprune.repack.lowering.context import Lowering
from autoprune.repack.lowering.steps import Map, NativeStep, View, contiguous_strides, storage_of
from autoprune.repack.native.op import NativeOp
from autoprune.repack.weights.quads import QUAD

Stride = tuple[int, int]
Shape = tuple[int, int, int, int]


def declare(lowering: Lowering, op: Quantize) -> None:
    """A value on a grid: its bytes are made where the first reader wants them."""
    if op.output not in lowering.values:  # unless the layer before it wrote them
        lowering.define(op.output, tuple(lowering.values[op.inputs[0]].shape))
        put_on(lowering, op.output, op.grid)
        lowering.unrounded[op.output] = op.inputs[0]


def put_on(lowering: Lowering, name: str, grid: Grid) -> None:
    """Tells that the value lies on a grid."""
    lowering.grids[name] = grid
    lowering.made_of_bytes[name] = plain


def as_map(shape: tuple[int, ...]) -> Shape:
    """A value's shape as (images, channels, rows, columns): of tokens (1, features, 1, tokens)."""
    if len(shape) == 4:
        return shape
    return (1, shape[-1], 1, math.prod(shape[:-1]))


def lanes_of(channels: int) -> int:
    """Lanes that hold a position's channels."""
    return -(-channels // QUAD)


def made_map(lowering: Lowering, name: str, shape: Shape, stride: Stride = (1, 1)) -> Map:
    """A new interleaved map of a value of `shape`, which the next step writes."""
    batch, channels, height, width = shape
    made = Map((batch, lanes_of(channels), height, width), stride, 0.0)
    lowering.interleaved[name, stride, lowering.grids[name].zero_point] = made
    return made.padded((0, 0))


def interleaved(
    lowering: Lowering, name: str, padding: tuple[int, int] = (0, 0), stride: Stride = (1, 1), border: int | None = None
) -> Map:
    """A value on a grid as an interleaved map with room for `padding`, in phase planes where `stride` is given.

    Around it lies `border`, a byte; the zero point when None.
    """
    own = lowering.grids[name].zero_point
    border = own if border is None else border
    key = (name, stride, border)
    if key not in lowering.interleaved:
        plain = (name, (1, 1), own)
        if border != own and plain not in lowering.interleaved:
            _quantised(lowering, name, (1, 1))
        there = lowering.interleaved.get(plain)
        if there is None:
            _quantised(lowering, name, stride)
        else:
            _moved(lowering, name, there, stride, border)
    return lowering.interleaved[key].padded(padding)


def _quantised(lowering: Lowering, name: str, stride: Stride) -> None:
    """The step that rounds a value's floats to bytes."""
    source, grid = lowering.unrounded.get(name, name), lowering.grids[name]
    shape = as_map(tuple(lowering.values[source].shape))
    floats = lowering.maps.get((source, (1, 1), 0.0)) if len(lowering.values[source].shape) == 4 else None
    if floats is None:
        floats = lowering.planes.get(source)
    read: Map | View = floats if floats is not None else _plain(lowering, source)
    made = made_map(lowering, name, shape, stride)

    def build(*_: Any) -> NativeOp:
        x = read.ref() if isinstance(read, Map) else _tokens(read, shape)
        return byte_nodes.quantised(name, shape, x, made.at, grid, lowering.target)

    lowering.steps.append(NativeStep(name, [read.buffer], made.buffer, build))


def _plain(lowering: Lowering, name: str) -> View:
    view = lowering.plain(name)
    return view if len(view.shape) == 4 and view.stride[3] == 1 else lowering.rows(name)


def _tokens(view: View, shape: Shape) -> StridedRef:
    """Rows as (images, channels, rows, columns)."""
    if len(view.shape) == 4:
        return view.ref()
    rows = view.rows()
    return StridedRef(rows.slot, rows.offset_bytes, (0, 1, 0, shape[1]))


def _moved(lowering: Lowering, name: str, there: Map, stride: Stride, border: int) -> None:
    """The step that sorts a map into phase planes, or lays another border around it."""
    made = lowering.interleaved[name, stride, border] = Map(there.shape, stride, 0.0).padded((0, 0))

    def build(*_: Any) -> NativeOp:
        return byte_nodes.moved(name, there.shape[0], there.at, made.at, border, lowering.target)

    lowering.steps.append(NativeStep(name, [there.buffer], made.buffer, build))


def plain(lowering: Lowering, name: str) -> None:
    """The step that makes a value's floats, in rows, of its bytes."""
    meta, given = lowering.values[name], interleaved(lowering, name)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    shape = as_map(tuple(meta.shape))

    def build(*_: Any) -> NativeOp:
        strides = contiguous_strides(shape) if meta.dim() == 4 else (0, 1, 0, shape[1])
        y, grid = buffer.ref(*strides), lowering.grids[name]
        return byte_nodes.dequantised(name, shape, given.at, y, grid, lowering.target)

    lowering.steps.append(NativeStep(name, [given.buffer], buffer, build))


def made_on(lowering: Lowering, name: str, rounding: Quantize, shape: tuple[int, ...]) -> Map:
    """The interleaved map that the next step writes, of a value that `rounding` alone reads."""
    lowering.define(name, shape)
    lowering.define(rounding.output, shape)
    put_on(lowering, rounding.output, rounding.grid)
    return made_map(lowering, rounding.output, as_map(shape))


def only_reader(lowering: Lowering, op: Op) -> Quantize | None:
    """The operation that moves a result onto a grid, where nothing else reads it: it need not exist as floats."""
    readers = lowering.readers.get(op.output, [])
    if len(readers) == 1 and isinstance(readers[0], Quantize) and op.output not in lowering.returned:
        return readers[0]
    return None
