"""Group-wise sparse convolution as an offset-GEMM: one native call for a batch of images.

With the zero border stored around the feature map, the weight at (channel, dy, dx) reads the same flat array at a
constant offset for every output position, so there is no im2col, no gather, and no zero to skip. The rows of a
group by some vectors of positions stay in registers while k walks the group's kept positions.

A stride is served by phase planes: padded position (y, x) lies in plane (y mod sh, x mod sw), where neighbouring
outputs read neighbouring inputs again. For stride 1 the left border of a row is the right border of the row above.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_function, once_a_process
from autoprune.repack.kernels.ir import (
    FLOATS,
    I8,
    I64,
    INTS,
    LONGS,
    at,
    const,
    fma,
    load_vector,
    long_at,
    loop,
    relu_if,
    smaller,
    splat,
    store_vector,
)


class Field(IntEnum):
    """Entries of the int64 array that describes one call."""

    BATCH = 0
    CHANNELS = 1
    HEIGHT = 2
    WIDTH = 3
    STRIDE_H = 4
    STRIDE_W = 5
    PAD_H = 6
    PAD_W = 7
    PITCH = 8  # floats in a row of a plane
    PLANE = 9  # floats in a plane
    COPY = 10  # 0: the input itself is read (1x1, stride 1, no padding)
    SCRATCH = 11  # floats of scratch for one image
    OUT_ROWS = 12
    OUT_COLUMNS = 13
    POSITIONS = 14  # flat output positions, those in the border included
    END = 15  # no tile may read beyond this position; beyond all bounds when the scratch has room
    BLOCK_ROWS = 16  # output rows computed at a time, so that their results stay in the nearest cache
    GROUPS = 17
    RELU = 18
    Y_PITCH = 19  # floats a row of the result scratch
    X_IMAGE = 20
    Y_IMAGE = 21
    Y_CHANNEL = 22
    GROUP_POINTER = 23  # addresses from here on
    OFFSETS = 24
    VALUES = 25
    BIAS = 26
    OUT_INDEX = 27
    Y_MARGIN = 28  # floats before the result scratch, for a tile that was pulled back
    ZEROED = 29  # 1 when the scratch has a border to clear
    PHASES = 30  # bit p: some kept tap reads phase plane p, so it must be filled


@once_a_process
def convolution_kernel(rows: int, target: Target) -> Callable[..., None]:
    """kernel(fields, x, y, x_scratch, y_scratch) for groups of `rows` filters; compiled once a process."""
    module = ir.Module()
    tile_rows, vectors = target.tile(rows)
    tiles = [_tile(module, tile_rows, count, target.lanes) for count in range(1, vectors + 1)]
    _driver(module, rows, tile_rows, tiles, target.lanes)
    return compile_function(module, "convolution", target, 5)


def _tile(module: ir.Module, rows: int, vectors: int, lanes: int) -> ir.Function:
    """tile(x, offsets, kept, w, w_pitch, bias, y, y_pitch): `rows` filters by `vectors` x `lanes` positions."""
    kind = ir.FunctionType(ir.VoidType(), [FLOATS, INTS, I64, FLOATS, I64, FLOATS, FLOATS, I64])
    function = ir.Function(module, kind, f"tile_{rows}x{vectors}")
    function.linkage = "internal"
    x, offsets, kept, w, w_pitch, bias, y, y_pitch = function.args
    fused = fma(module, lanes)
    entry, head, body, done = (function.append_basic_block(name) for name in ("entry", "head", "body", "done"))
    b = ir.IRBuilder(entry)
    start = [splat(b, b.load(at(b, bias, const(row))), lanes) for row in range(rows)]
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    k.add_incoming(const(0), entry)
    sums = [[b.phi(start[0].type) for _ in range(vectors)] for _ in range(rows)]
    for row, first in enumerate(start):
        for each in sums[row]:
            each.add_incoming(first, entry)
    b.cbranch(b.icmp_signed("<", k, kept), body, done)
    b.position_at_end(body)
    source = at(b, x, long_at(b, offsets, k))
    inputs = [load_vector(b, at(b, source, const(lanes * v)), lanes) for v in range(vectors)]
    weights = at(b, w, b.mul(k, w_pitch))
    for row in range(rows):
        weight = splat(b, b.load(at(b, weights, const(row))), lanes)
        for v in range(vectors):
            sums[row][v].add_incoming(b.call(fused, [inputs[v], weight, sums[row][v]]), body)
    k.add_incoming(b.add(k, const(1)), body)
    b.branch(head)
    b.position_at_end(done)
    for row in range(rows):
        target_row = at(b, y, b.mul(y_pitch, const(row)))
        for v in range(vectors):
            store_vector(b, sums[row][v], at(b, target_row, const(lanes * v)), lanes)
    b.ret_void()
    return function


def _driver(module: ir.Module, rows: int, tile_rows: int, tiles: list[ir.Function], lanes: int) -> None:
    kind = ir.FunctionType(ir.VoidType(), [LONGS, FLOATS, FLOATS, FLOATS, FLOATS])
    function = ir.Function(module, kind, "convolution")
    fields, x, y, x_scratch, y_scratch = function.args
    for argument in (x, y, x_scratch, y_scratch):
        argument.add_attribute("noalias")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    get = {field: b.load(at(b, fields, const(field))) for field in Field}
    with loop(b, const(0), get[Field.BATCH]) as image:
        x_image = at(b, x, b.mul(image, get[Field.X_IMAGE]))
        y_image = at(b, y, b.mul(image, get[Field.Y_IMAGE]))
        copied = b.icmp_signed("!=", get[Field.COPY], const(0))
        with b.if_then(copied):
            _copy_in(module, b, get, x_image, x_scratch)
        source = b.select(copied, x_scratch, x_image)
        rounded = b.add(get[Field.OUT_ROWS], b.sub(get[Field.BLOCK_ROWS], const(1)))
        with loop(b, const(0), b.sdiv(rounded, get[Field.BLOCK_ROWS])) as block:
            first_row = b.mul(block, get[Field.BLOCK_ROWS])
            block_rows = smaller(b, get[Field.BLOCK_ROWS], b.sub(get[Field.OUT_ROWS], first_row))
            start = b.mul(first_row, get[Field.PITCH])
            length = b.add(b.mul(b.sub(block_rows, const(1)), get[Field.PITCH]), get[Field.OUT_COLUMNS])
            length = smaller(b, length, b.sub(get[Field.POSITIONS], start))
            with loop(b, const(0), get[Field.GROUPS]) as group:
                _group(b, get, rows, tile_rows, tiles, lanes, source, y_scratch, group, start, length)
                _copy_out(b, get, rows, y_image, y_scratch, group, first_row, block_rows)
    b.ret_void()


def _copy_in(module: ir.Module, b: ir.IRBuilder, get: dict[Field, ir.Value], x: ir.Value, scratch: ir.Value) -> None:
    """The image into zero-bordered planes, one a channel and phase."""
    zero = module.declare_intrinsic("llvm.memset", [I8.as_pointer(), I64])
    size = b.mul(b.mul(get[Field.SCRATCH], get[Field.ZEROED]), const(4))
    b.call(zero, [b.bitcast(scratch, I8.as_pointer()), ir.Constant(I8, 0), size, ir.Constant(ir.IntType(1), 0)])
    high, wide = get[Field.STRIDE_H], get[Field.STRIDE_W]
    with loop(b, const(0), get[Field.CHANNELS]) as channel:
        planes = b.mul(b.mul(channel, b.mul(high, wide)), get[Field.PLANE])
        with loop(b, const(0), get[Field.HEIGHT]) as row:
            padded = b.add(row, get[Field.PAD_H])
            first_phase = b.mul(b.srem(padded, high), wide)
            plane = b.add(planes, b.mul(first_phase, get[Field.PLANE]))
            target = at(b, scratch, b.add(plane, b.mul(b.sdiv(padded, high), get[Field.PITCH])))
            line = at(b, x, b.mul(b.add(b.mul(channel, get[Field.HEIGHT]), row), get[Field.WIDTH]))
            with b.if_else(b.icmp_signed("==", wide, const(1))) as (contiguous, strided):
                with contiguous:
                    shifted = at(b, target, get[Field.PAD_W])
                    with loop(b, const(0), get[Field.WIDTH]) as column:
                        b.store(b.load(at(b, line, column)), at(b, shifted, column))
                with strided, loop(b, const(0), wide) as phase:
                    bit = b.shl(const(1), b.add(first_phase, phase))
                    with b.if_then(b.icmp_signed("!=", b.and_(get[Field.PHASES], bit), const(0))):
                        _copy_phase(b, get, line, at(b, target, b.mul(phase, get[Field.PLANE])), phase)


def _copy_phase(b: ir.IRBuilder, get: dict[Field, ir.Value], line: ir.Value, target: ir.Value, phase: ir.Value) -> None:
    """Every `stride`-th column of a padded line, those with padded column = phase (mod stride)."""
    wide, pad = get[Field.STRIDE_W], get[Field.PAD_W]
    before = b.sub(b.add(pad, b.sub(wide, const(1))), phase)
    first = b.sdiv(before, wide)  # the first index whose column is inside the image
    column = b.sub(b.add(b.mul(first, wide), phase), pad)
    left = b.sub(get[Field.WIDTH], column)
    count = b.sdiv(b.add(left, b.sub(wide, const(1))), wide)
    with loop(b, const(0), count) as i:
        b.store(b.load(at(b, line, b.add(column, b.mul(i, wide)))), at(b, target, b.add(first, i)))


def _group(
    b: ir.IRBuilder,
    get: dict[Field, ir.Value],
    rows: int,
    tile_rows: int,
    tiles: list[ir.Function],
    lanes: int,
    source: ir.Value,
    y_scratch: ir.Value,
    group: ir.Value,
    start: ir.Value,
    length: ir.Value,
) -> None:
    """All positions of a block for one group: whole tiles, then one narrower tile for what is left."""
    pointer = _pointer(b, get, Field.GROUP_POINTER, INTS)
    low = long_at(b, pointer, group)
    kept = b.sub(long_at(b, pointer, b.add(group, const(1))), low)
    offsets = at(b, _pointer(b, get, Field.OFFSETS, INTS), low)
    values = at(b, _pointer(b, get, Field.VALUES, FLOATS), b.mul(low, const(rows)))
    bias = at(b, _pointer(b, get, Field.BIAS, FLOATS), b.mul(group, const(rows)))
    width = lanes * len(tiles)
    whole = b.mul(b.sdiv(length, const(width)), const(width))

    def compute(count: int, position: ir.Value) -> None:
        # The last tile is pulled back rather than read past the end of an input that was not copied.
        wanted = b.add(start, position)
        clamped = smaller(b, wanted, b.sub(get[Field.END], const(lanes * count)))
        into = at(b, y_scratch, b.add(get[Field.Y_MARGIN], b.sub(clamped, start)))
        for row in range(0, rows, tile_rows):
            b.call(
                tiles[count - 1],
                [
                    at(b, source, clamped),
                    offsets,
                    kept,
                    at(b, values, const(row)),
                    const(rows),
                    at(b, bias, const(row)),
                    at(b, into, b.mul(get[Field.Y_PITCH], const(row))),
                    get[Field.Y_PITCH],
                ],
            )

    with loop(b, const(0), whole, width) as position:
        compute(len(tiles), position)
    rest = b.sub(length, whole)
    vectors = b.sdiv(b.add(rest, const(lanes - 1)), const(lanes))
    end = b.append_basic_block("rest_done")
    cases = [b.append_basic_block(f"rest_{count}") for count in range(1, len(tiles) + 1)]
    switch = b.switch(vectors, end)
    for count, block in enumerate(cases, start=1):
        switch.add_case(const(count), block)
        b.position_at_end(block)
        compute(count, whole)
        b.branch(end)
    b.position_at_end(end)


def _copy_out(
    b: ir.IRBuilder,
    get: dict[Field, ir.Value],
    rows: int,
    y: ir.Value,
    y_scratch: ir.Value,
    group: ir.Value,
    first_row: ir.Value,
    block_rows: ir.Value,
) -> None:
    """The valid columns of a group's results to where they belong; a row of a padded group belongs nowhere."""
    relu = b.icmp_signed("!=", get[Field.RELU], const(0))
    out_index = _pointer(b, get, Field.OUT_INDEX, INTS)
    with loop(b, const(0), const(rows)) as row:
        channel = long_at(b, out_index, b.add(b.mul(group, const(rows)), row))
        with b.if_then(b.icmp_signed(">=", channel, const(0))):
            results = at(b, y_scratch, b.add(get[Field.Y_MARGIN], b.mul(row, get[Field.Y_PITCH])))
            target = at(b, y, b.mul(channel, get[Field.Y_CHANNEL]))
            with loop(b, const(0), block_rows) as line:
                absolute = b.add(first_row, line)
                source = at(b, results, b.mul(line, get[Field.PITCH]))
                into = at(b, target, b.mul(absolute, get[Field.OUT_COLUMNS]))
                left = b.sub(get[Field.POSITIONS], b.mul(absolute, get[Field.PITCH]))
                with loop(b, const(0), smaller(b, get[Field.OUT_COLUMNS], left)) as column:
                    b.store(relu_if(b, b.load(at(b, source, column)), relu), at(b, into, column))


def _pointer(b: ir.IRBuilder, get: dict[Field, ir.Value], field: Field, kind: ir.Type) -> ir.Value:
    return b.inttoptr(get[field], kind)
