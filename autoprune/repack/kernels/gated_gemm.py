"""The offset-GEMM of a gated convolution: what the input has silenced is not computed.

Before a group is computed, its kept positions whose input channel lives are written to a list, a run of channels that
share a factor at a time. The tile walks the list, an entry of which says where input and weights lie; the weights stay
where they are. Where all groups keep the same positions, one list serves them all. A group none of whose filters lives
is filled with zeros, or left as it is where nobody looks at it.
"""

from __future__ import annotations

from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import (
    FLOAT,
    FLOAT32_ARRAY,
    INT32_ARRAY,
    INT64_ARRAY,
    NUMBER,
    OFFSET,
    PRESENCE,
    SLOT,
    Fields,
)
from autoprune.repack.kernels.ir import (
    FLOATS,
    I32,
    I64,
    INTS,
    LONGS,
    address,
    at,
    const,
    float_field,
    long_at,
    loop,
    op_function,
    pointer_field,
    smaller,
    store_vector,
    vector,
)
from autoprune.repack.kernels.register_tile import Extra, clear_borders, cover, place_of, tile, tiles


class Field(Fields):
    """Entries of the int64 array that describes one op; those that offset_gemm has mean the same."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    RESIDUAL_SLOT = SLOT.of("residual")
    RESIDUAL_OFFSET = OFFSET.of("residual")
    RESIDUAL = PRESENCE.of("residual")
    X_IMAGE = NUMBER
    Y_IMAGE = NUMBER
    RESIDUAL_IMAGE = NUMBER.of("residual")
    MASK = INT32_ARRAY
    GROUP_POINTER = INT32_ARRAY
    OFFSETS = INT32_ARRAY
    VALUES = FLOAT32_ARRAY
    BIAS = FLOAT32_ARRAY
    Y_CHANNEL = INT32_ARRAY
    RESIDUAL_CHANNEL = INT32_ARRAY
    LOW = FLOAT
    HIGH = FLOAT
    GROUPS = NUMBER
    POSITIONS = NUMBER
    CHUNK = NUMBER
    BLOCK = NUMBER
    CHUNKS = NUMBER
    BLOCKS = NUMBER
    BATCH = NUMBER
    CHUNK_STRIDE = NUMBER
    BLOCK_STRIDE = NUMBER
    IMAGE_STRIDE = NUMBER
    SCRATCH_SLOT = SLOT
    SCRATCH_OFFSET = OFFSET
    SCRATCH = NUMBER  # floats from a thread's scratch to the next: see `scratch`
    PANELS = NUMBER  # 1: a list is walked at once
    # 33 to 37: of columns that are masked, which a gated convolution has none of
    BORDER = NUMBER.at(38)
    BORDER_FIRST = NUMBER
    GATE_SLOT = SLOT  # factors of the output channels
    GATE_OFFSET = OFFSET
    GATE_IMAGE = NUMBER  # floats from an image's to the next's
    GATE_OF = INT32_ARRAY  # per row: the factor it is multiplied by
    LIVE = PRESENCE.of("live")  # given where input channels are gated
    LIVE_SLOT = SLOT.of("live")  # factors of the input channels
    LIVE_OFFSET = OFFSET.of("live")
    LIVE_IMAGE = NUMBER.of("live")  # so many are an image's
    LIVE_RUNS = INT32_ARRAY.of("live")  # per group and factor of the input: its channels' first entry; then the end
    ENTRIES = INT64_ARRAY  # per kept position: its offset, and 32 bits up where in its group its weights lie
    SHARED = NUMBER  # 1 when all groups keep the same positions
    DEAD = NUMBER  # what becomes of groups that do not live: see `Dead`


class Dead(IntEnum):
    """What a group that does not live needs: everything but sums, zeros, nothing."""

    FINISHED = 0  # a residual, or an activation that makes something of zero
    ZEROS = 1
    UNREAD = 2


FACTORS = 16  # floats before a thread's list
SLACK = 16  # behind it: the widest vector


def scratch(kept: int) -> int:
    """Floats of scratch a thread needs for groups that keep at most `kept` positions."""
    return FACTORS + 2 * kept + SLACK


@kernel
def gated_gemm(rows: int, target: Target, activation: str = "") -> ir.Module:
    """The op for groups of `rows` filters; compiled once a process.

    Args:
        rows: filters in a group.
        target: what to compile for.
        activation: a row of ACTIVATIONS that is no clamp.
    """
    module, heights = ir.Module(), tiles(rows, target)
    lanes = target.lanes
    built = {count: tile(module, each, count, target, activation, Extra.GATED) for count, each in heights.items()}
    _op(module, rows, built, heights, lanes)
    return module


# long: one function of LLVM IR in the order in which it runs; its parts share nearly all of its values.
def _op(module: ir.Module, rows: int, built: dict[int, ir.Function], heights: dict[int, int], lanes: int) -> None:
    select_live = _select_live(module, lanes)
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    chunk, block, image, start, length = place_of(b, item, Field, get)

    def base(slot: Field, offset: Field, stride: Field) -> ir.Value:
        return at(b, address(b, slots, get[slot], get[offset]), b.mul(image, get[stride]))

    x = at(b, base(Field.X_SLOT, Field.X_OFFSET, Field.X_IMAGE), start)
    y = at(b, base(Field.Y_SLOT, Field.Y_OFFSET, Field.Y_IMAGE), start)
    residual = at(b, base(Field.RESIDUAL_SLOT, Field.RESIDUAL_OFFSET, Field.RESIDUAL_IMAGE), start)
    gate = base(Field.GATE_SLOT, Field.GATE_OFFSET, Field.GATE_IMAGE)
    live = base(Field.LIVE_SLOT, Field.LIVE_OFFSET, Field.LIVE_IMAGE)
    mask = at(b, pointer_field(b, get[Field.MASK], INTS), start)
    low, high = float_field(b, get[Field.LOW]), float_field(b, get[Field.HIGH])
    pointer = pointer_field(b, get[Field.GROUP_POINTER], INTS)
    runs = pointer_field(b, get[Field.LIVE_RUNS], INTS)
    factors = at(
        b, address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET]), b.mul(thread, get[Field.SCRATCH])
    )
    has_live = b.icmp_signed("!=", get[Field.LIVE], const(0))
    own = b.bitcast(at(b, factors, const(FACTORS)), LONGS)
    entries = pointer_field(b, get[Field.ENTRIES], LONGS)
    shared = b.icmp_signed("!=", get[Field.SHARED], const(0))
    first = b.mul(chunk, get[Field.CHUNK])
    last = smaller(b, b.add(first, get[Field.CHUNK]), get[Field.GROUPS])
    found = b.alloca(I64)

    def find(group: ir.Value) -> None:
        """Lists the kept positions of `group` whose channel lives."""
        begin = long_at(b, pointer, group)
        kept = b.sub(long_at(b, pointer, b.add(group, const(1))), begin)
        with b.if_else(has_live) as (some, all_):
            with some:
                first_run = at(b, runs, b.mul(group, get[Field.LIVE_IMAGE]))
                b.store(b.call(select_live, [first_run, entries, get[Field.LIVE_IMAGE], live, own]), found)
            with all_:
                b.store(kept, found)

    channels = pointer_field(b, get[Field.Y_CHANNEL], INTS)
    clear_borders(b, item, block, y, channels, (b.mul(first, const(rows)), b.mul(last, const(rows))), Field, get)
    with b.if_then(shared):
        find(first)
    with loop(b, first, last) as group:
        row0 = b.mul(group, const(rows))
        gate_of = at(b, pointer_field(b, get[Field.GATE_OF], INTS), row0)
        alive = ir.Constant(ir.IntType(1), 0)
        for row in range(rows):
            factor = at(b, gate, long_at(b, gate_of, const(row)))
            b.store(b.load(factor), at(b, factors, const(row)))
            alive = b.or_(alive, _lives(b, factor))
        with b.if_then(b.and_(alive, b.not_(shared))):
            find(group)
        count = b.select(alive, b.load(found), const(0))
        begin = long_at(b, pointer, group)
        list_ = b.select(has_live, own, at(b, entries, begin))
        offsets = at(b, pointer_field(b, get[Field.OFFSETS], INTS), begin)
        values = at(b, pointer_field(b, get[Field.VALUES], FLOATS), b.mul(begin, const(rows)))
        bias = at(b, pointer_field(b, get[Field.BIAS], FLOATS), row0)
        y_channel = at(b, channels, row0)
        residual_channel = at(b, pointer_field(b, get[Field.RESIDUAL_CHANNEL], INTS), row0)

        def compute(width: int, position: ir.Value) -> None:
            for row in reversed(range(0, rows, heights[width])):
                step = const(row)
                b.call(
                    built[width],
                    [
                        at(b, x, position), offsets, count, at(b, values, step), const(rows), at(b, bias, step),
                        at(b, y, position), at(b, y_channel, step), at(b, residual, position),
                        at(b, residual_channel, step), get[Field.RESIDUAL], at(b, mask, position), low, high, y,
                        const(0), list_, at(b, factors, step),
                    ],
                )  # fmt: skip

        with b.if_else(b.or_(alive, b.icmp_signed("==", get[Field.DEAD], const(Dead.FINISHED)))) as (work, rest):
            with work:
                cover(b, length, lanes, max(built), compute)
            with rest, b.if_then(b.icmp_signed("==", get[Field.DEAD], const(Dead.ZEROS))):
                nothing = ir.Constant(vector(lanes), None)
                for row in range(rows):
                    line = at(b, y, long_at(b, y_channel, const(row)))
                    with loop(b, const(0), length, lanes) as position:
                        store_vector(b, nothing, at(b, line, position), lanes)
    b.ret_void()


def _select_live(module: ir.Module, lanes: int) -> ir.Function:
    """Writes the entries of a group whose input channels live to `found`; returns how many.

    Whole vectors are written: up to one beyond the last entry.
    """
    kind = ir.FunctionType(I64, [INTS, LONGS, I64, FLOATS, LONGS])
    function = ir.Function(module, kind, "select_live")
    function.linkage = "internal"
    runs, entries, gates, factors, found = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    length = b.alloca(I64)
    b.store(const(0), length)
    step = lanes // 2
    several = ir.VectorType(I64, step).as_pointer()
    with loop(b, const(0), gates) as gate, b.if_then(_lives(b, at(b, factors, gate))):
        begin, end = long_at(b, runs, gate), long_at(b, runs, b.add(gate, const(1)))
        filled = b.load(length)
        source, target = at(b, entries, begin), at(b, found, filled)
        count = b.sub(end, begin)
        with loop(b, const(0), count, step) as number:
            copied = b.load(b.bitcast(at(b, source, number), several))
            copied.align = 4
            b.store(copied, b.bitcast(at(b, target, number), several)).align = 4
        b.store(b.add(filled, count), length)
    b.ret(b.load(length))
    return function


def _lives(b: ir.IRBuilder, factor: ir.Value) -> ir.Value:
    """Whether the float there is not zero."""
    bits = b.load(b.bitcast(factor, INTS))
    return b.icmp_signed("!=", b.shl(bits, ir.Constant(I32, 1)), ir.Constant(I32, 0))
