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
from autoprune.repack.weights.quads import lanes_of

Stride = tuple[int, int]
Key = tuple[str, Stride, int, bool]
MAP_AXES = 4
REACH = 1  # lanes before a map's first one: mixed cells are read from up to three bytes before a lane on
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


def as_map(shape: tuple[int, ...], tokens: bool) -> Shape:
    """A value's shape as (images, channels, rows, columns): of tokens, features last, (1, features, 1, tokens)."""
    if tokens:
        return (1, shape[-1], 1, math.prod(shape[:-1]))
    batch, channels, height, width = shape
    return (batch, channels, height, width)


def made_map(
    lowering: Lowering, name: str, shape: tuple[int, ...], tokens: bool = False, stride: Stride = (1, 1)
) -> Map:
    """A new interleaved map of a value of `shape`, which the next step writes."""
    batch, channels, height, width = as_map(shape, tokens)
    made = Map((batch, lanes_of(channels), height, width), stride, 0.0)
    lowering.interleaved[name, stride, lowering.grids[name].zero_point, tokens] = made
    return made.padded((0, 0))


def interleaved(
    lowering: Lowering, name: str, padding: tuple[int, int] = (0, 0), stride: Stride = (1, 1),
    border: int | None = None, tokens: bool = False,
) -> Map:  # fmt: skip
    """A value on a grid as an interleaved map with room for `padding`.

    Args:
        lowering: where the value is known.
        name: of the value.
        padding: rows and columns around it that are read.
        stride: where it is given the map lies in phase planes.
        border: the byte that lies around it; the zero point when None.
        tokens: whether its last axis is its features; else its second is its channels.
    """
    own = lowering.grids[name].zero_point
    border = own if border is None else border
    key = (name, stride, border, tokens)
    if key not in lowering.interleaved:
        whole = (name, (1, 1), own, tokens)
        if border != own and whole not in lowering.interleaved:
            _quantised(lowering, name, (1, 1), tokens)
        there = lowering.interleaved.get(whole)
        if there is None:
            _quantised(lowering, name, stride, tokens)
        else:
            _moved(lowering, name, there, key)
    return lowering.interleaved[key].padded(padding, REACH)


def _quantised(lowering: Lowering, name: str, stride: Stride, tokens: bool) -> None:
    """The step that rounds a value's floats to bytes."""
    source, grid = lowering.unrounded.get(name, name), lowering.grids[name]
    shape = as_map(tuple(lowering.values[source].shape), tokens)
    floats = lowering.planes.get(source) if tokens else lowering.maps.get((source, (1, 1), 0.0))
    read: Map | View = floats if floats is not None else _floats(lowering, source, tokens)
    made = made_map(lowering, name, tuple(lowering.values[source].shape), tokens, stride)

    def build(*_: Any) -> NativeOp:
        x = read.ref() if isinstance(read, Map) else _as_map_ref(read, shape, tokens)
        return byte_nodes.quantised(name, shape, x, made.at, grid, lowering.target)

    lowering.steps.append(NativeStep(name, [read.buffer], made.buffer, build))


def _floats(lowering: Lowering, name: str, tokens: bool) -> View:
    view = lowering.plain(name)
    return view if not tokens and view.stride[3] == 1 else lowering.rows(name)


def _as_map_ref(view: View, shape: Shape, tokens: bool) -> StridedRef:
    """Rows as (images, channels, rows, columns)."""
    if not tokens:
        return view.ref()
    rows = view.rows()
    return StridedRef(rows.slot, rows.offset_bytes, (0, 1, 0, shape[1]))


def _moved(lowering: Lowering, name: str, there: Map, key: Key) -> None:
    """The step that sorts a map into phase planes, or lays another border around it."""
    _, stride, border, _ = key
    made = lowering.interleaved[key] = Map(there.shape, stride, 0.0).padded((0, 0))

    def build(*_: Any) -> NativeOp:
        return byte_nodes.moved(name, there.shape[0], there.at, made.at, border, lowering.target)

    lowering.steps.append(NativeStep(name, [there.buffer], made.buffer, build))


def plain(lowering: Lowering, name: str) -> None:
    """The step that makes a value's floats, in rows, of its bytes."""
    meta, zero = lowering.values[name], lowering.grids[name].zero_point
    as_tokens = (name, (1, 1), zero, True)
    tokens = meta.dim() != MAP_AXES or as_tokens in lowering.interleaved
    given = interleaved(lowering, name, tokens=tokens)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    shape = as_map(tuple(meta.shape), tokens)

    def build(*_: Any) -> NativeOp:
        y = buffer.ref(*((0, 1, 0, shape[1]) if tokens else contiguous_strides(shape)))
        return byte_nodes.dequantised(name, shape, given.at, y, lowering.grids[name], lowering.target)

    lowering.steps.append(NativeStep(name, [given.buffer], buffer, build))


def made_on(lowering: Lowering, name: str, rounding: Quantize, shape: tuple[int, ...], tokens: bool = False) -> Map:
    """The interleaved map that the next step writes, of a value that `rounding` alone reads."""
    lowering.define(name, shape)
    lowering.define(rounding.output, shape)
    put_on(lowering, rounding.output, rounding.grid)
    return made_map(lowering, rounding.output, shape, tokens)


def only_reader(lowering: Lowering, op: Op) -> Quantize | None:
    """The operation that moves a result onto a grid, where nothing else reads it: it need not exist as floats."""
    readers = lowering.readers.get(op.output, [])
    if len(readers) == 1 and isinstance(readers[0], Quantize) and op.output not in lowering.returned:
        return readers[0]
    return None
