"""The offset-GEMM of a gated convolution: what the input has silenced is not computed.

Before a group is computed, the numbers of its kept positions whose input channel lives are written to a list, without
a branch: about two cycles a position, against the group's filters times the item's positions. The tile walks the list;
the weights stay where they are. A group none of whose filters lives walks nothing. Where all groups keep the same
positions, one list serves them all.
"""

from __future__ import annotations

from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I64,
    INTS,
    address,
    at,
    const,
    float_field,
    long_at,
    loop,
    op_function,
    pointer_field,
    smaller,
)
from autoprune.repack.kernels.offset_gemm import cover, tile, tiles


class Field(IntEnum):
    """Entries of the int64 array that describes one op; those that offset_gemm has mean the same."""

    X_SLOT = 0
    X_OFFSET = 1
    Y_SLOT = 2
    Y_OFFSET = 3
    RESIDUAL_SLOT = 4
    RESIDUAL_OFFSET = 5
    RESIDUAL = 6
    X_IMAGE = 7
    Y_IMAGE = 8
    RESIDUAL_IMAGE = 9
    MASK = 10
    GROUP_POINTER = 11
    OFFSETS = 12
    VALUES = 13
    BIAS = 14
    Y_CHANNEL = 15
    RESIDUAL_CHANNEL = 16
    LOW = 17
    HIGH = 18
    GROUPS = 19
    POSITIONS = 20
    CHUNK = 21
    BLOCK = 22
    CHUNKS = 23
    BLOCKS = 24
    BATCH = 25
    CHUNK_STRIDE = 26
    BLOCK_STRIDE = 27
    IMAGE_STRIDE = 28
    SCRATCH_SLOT = 29
    SCRATCH_OFFSET = 30
    SCRATCH = 31  # floats from a thread's scratch to the next: see `scratch`
    PANELS = 32  # always 0: a list is walked at once
    GATE_SLOT = 33  # factors of the output channels
    GATE_OFFSET = 34
    GATE_IMAGE = 35  # floats from an image's to the next's
    GATE_OF = 36  # address of int32 a row: the factor it is multiplied by
    LIVE = 37  # 1 when input channels are gated
    LIVE_SLOT = 38  # factors of the input channels
    LIVE_OFFSET = 39
    LIVE_IMAGE = 40
    LIVE_OF = 41  # address of int32 a kept position: the factor its input channel was multiplied by
    NUMBERS = 42  # address of int32 0, 1, 2, ...: the list where every input channel lives
    SHARED = 43  # 1 when all groups keep the same positions


def scratch(rows: int, kept: int) -> int:
    """Floats of scratch a thread needs for groups of `rows` filters that keep at most `kept` positions."""
    return rows + kept


@once_a_process
def gated_gemm(rows: int, target: Target, activation: str = "") -> int:
    """The op for groups of `rows` filters; compiled once a process.

    Args:
        rows: filters in a group.
        target: what to compile for.
        activation: a row of ACTIVATIONS that is no clamp.
    """
    module, heights = ir.Module(), tiles(rows, target)
    built = {count: tile(module, each, count, target.lanes, activation, gated=True) for count, each in heights.items()}
    _op(module, rows, built, heights, target.lanes)
    return compile_op(module, "op", target)


def _op(module: ir.Module, rows: int, built: dict[int, ir.Function], heights: dict[int, int], lanes: int) -> None:
    select_live = _select_live(module)
    b, fields, slots, item, thread = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}

    def index(stride: Field, count: Field) -> ir.Value:
        return b.srem(b.sdiv(item, get[stride]), get[count])

    chunk, block = index(Field.CHUNK_STRIDE, Field.CHUNKS), index(Field.BLOCK_STRIDE, Field.BLOCKS)
    image = index(Field.IMAGE_STRIDE, Field.BATCH)
    start = b.mul(block, get[Field.BLOCK])
    length = smaller(b, get[Field.BLOCK], b.sub(get[Field.POSITIONS], start))

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
    live_of = pointer_field(b, get[Field.LIVE_OF], INTS)
    factors = at(
        b, address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET]), b.mul(thread, get[Field.SCRATCH])
    )
    has_live = b.icmp_signed("!=", get[Field.LIVE], const(0))
    own = b.bitcast(at(b, factors, const(rows)), INTS)
    list_ = b.select(has_live, own, pointer_field(b, get[Field.NUMBERS], INTS))
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
                b.store(b.call(select_live, [at(b, live_of, begin), kept, live, own]), found)
            with all_:
                b.store(kept, found)

    with b.if_then(shared):
        find(first)
    with loop(b, first, last) as group:
        row0 = b.mul(group, const(rows))
        gate_of = at(b, pointer_field(b, get[Field.GATE_OF], INTS), row0)
        alive = ir.Constant(ir.IntType(1), 0)
        for row in range(rows):
            factor = b.load(at(b, gate, long_at(b, gate_of, const(row))))
            b.store(factor, at(b, factors, const(row)))
            alive = b.or_(alive, b.fcmp_unordered("!=", factor, ir.Constant(F32, 0.0)))
        with b.if_then(b.and_(alive, b.not_(shared))):
            find(group)
        count = b.select(alive, b.load(found), const(0))
        begin = long_at(b, pointer, group)
        offsets = at(b, pointer_field(b, get[Field.OFFSETS], INTS), begin)
        values = at(b, pointer_field(b, get[Field.VALUES], FLOATS), b.mul(begin, const(rows)))
        bias = at(b, pointer_field(b, get[Field.BIAS], FLOATS), row0)
        y_channel = at(b, pointer_field(b, get[Field.Y_CHANNEL], INTS), row0)
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

        cover(b, length, lanes, max(built), compute)
    b.ret_void()


def _select_live(module: ir.Module) -> ir.Function:
    """Writes the numbers of the positions whose factor is not zero to `found`, at most `count`; returns how many."""
    kind = ir.FunctionType(I64, [INTS, I64, FLOATS, INTS])
    function = ir.Function(module, kind, "select_live")
    function.linkage = "internal"
    of, count, factors, found = function.args
    entry, head, body, done = (function.append_basic_block(name) for name in ("entry", "head", "body", "done"))
    b = ir.IRBuilder(entry)
    b.branch(head)
    b.position_at_end(head)
    number, length = b.phi(I64), b.phi(I64)
    number.add_incoming(const(0), entry)
    length.add_incoming(const(0), entry)
    b.cbranch(b.icmp_signed("<", number, count), body, done)
    b.position_at_end(body)
    b.store(b.trunc(number, ir.IntType(32)), at(b, found, length))
    factor = b.load(at(b, factors, long_at(b, of, number)))
    alive = b.zext(b.fcmp_unordered("!=", factor, ir.Constant(F32, 0.0)), I64)
    number.add_incoming(b.add(number, const(1)), body)
    length.add_incoming(b.add(length, alive), body)
    b.branch(head)
    b.position_at_end(done)
    b.ret(length)
    return function
