"""Group-wise sparse convolution as an offset-GEMM, a native op.

With the zero border stored around a feature map, the weight at (channel, dy, dx) reads the same flat array at a
constant offset for every output position, so there is no im2col, no gather, and no zero to skip. The rows of a
group by some vectors of positions stay in registers while k walks the group's kept positions. Results lie in an
array of the same pitch as the input's, so that a tile is stored as it is; a mask clears what falls on the border.

Where maps are small, a border column a row is much to compute for nothing: rows then follow each other, and a column of
the kernel is read through a mask of the positions at which it lies inside the map. The kept positions of a group come
in runs of one column each. Positions that fill no vector are taken singly where they are few: a vector holds the
filters of a group then, and a wide tile walks the position along.

An item is some groups by some positions of one image. How many, and which runs fastest, is tuned: few positions by
all groups keep the input in the nearest cache, few groups by all positions the weights.

With panels, a group is led past all positions of an item some inputs at a time: what it reads of a panel stays in the
nearest cache until the last tile is done with it (after Goto & van de Geijn 2008). The sums lie in scratch between one
panel and the next.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, PRESENCE, SLOT, Fields
from autoprune.repack.kernels.ir import (
    FLOATS,
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
from autoprune.repack.kernels.register_tile import (
    CARRY_IN,
    CARRY_OUT,
    Extra,
    Singles,
    clear_borders,
    cover,
    place_of,
    singles,
    tile,
    tiles,
)


class Field(Fields):
    """Entries of the int64 array that describes one op."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of the first image's position (0, 0) in channel 0
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    RESIDUAL_SLOT = SLOT.of("residual")
    RESIDUAL_OFFSET = OFFSET.of("residual")
    RESIDUAL = PRESENCE.of("residual")
    X_IMAGE = NUMBER  # floats from an image to the next
    Y_IMAGE = NUMBER
    RESIDUAL_IMAGE = NUMBER.of("residual")
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    GROUP_POINTER = INT32_ARRAY  # per group: its first kept position; with panels, a group and panel
    OFFSETS = INT32_ARRAY  # per kept position, two a pair: floats from an output position to what it reads
    VALUES = FLOAT32_ARRAY  # of pairs: the bits of two bfloat16 numbers each
    BIAS = FLOAT32_ARRAY
    Y_CHANNEL = INT32_ARRAY  # per row: floats from Y to the row's channel
    RESIDUAL_CHANNEL = INT32_ARRAY
    LOW = FLOAT  # results are clamped
    HIGH = FLOAT
    GROUPS = NUMBER
    POSITIONS = NUMBER
    CHUNK = NUMBER  # groups an item
    BLOCK = NUMBER  # positions an item
    CHUNKS = NUMBER
    BLOCKS = NUMBER
    BATCH = NUMBER
    CHUNK_STRIDE = NUMBER  # items from a chunk to the next
    BLOCK_STRIDE = NUMBER
    IMAGE_STRIDE = NUMBER
    SCRATCH_SLOT = SLOT.of("panels")  # where there are several panels
    SCRATCH_OFFSET = OFFSET.of("panels")
    SCRATCH = NUMBER.of("panels")  # floats from a thread's scratch to the next: see `scratch`
    PANELS = NUMBER  # that a group's inputs are cut into
    RUNS = NUMBER.of("columns")  # of a list of kept positions; this and the next four: where columns are masked
    ENDS = INT32_ARRAY.of("columns")  # per list and run: its end, in kept positions from the list's begin
    COLUMNS = NUMBER.of("columns")  # masks; run r reads through mask r mod COLUMNS
    INSIDE = INT32_ARRAY.of("columns")  # per column and position: -1 where what it reads lies inside the map, else 0
    INSIDE_LENGTH = NUMBER.of("columns")  # from a column's to the next
    BORDER = NUMBER  # floats of border behind a channel's positions, which are cleared
    BORDER_FIRST = NUMBER  # and before the first channel


@kernel
def offset_gemm(
    rows: int, target: Target, activation: str = "", columns: bool = False, pairs: bool = False
) -> ir.Module:
    """The op for groups of `rows` filters; compiled once a process.

    Args:
        rows: filters in a group.
        target: what to compile for.
        activation: a row of ACTIVATIONS that is no clamp.
        columns: whether columns are read through masks.
        pairs: whether weights and inputs are bfloat16 numbers: lists are of pairs of kept positions.
    """
    return offset_gemm_module(rows, target, activation, columns, pairs)


def offset_gemm_module(
    rows: int, target: Target, activation: str = "", columns: bool = False, pairs: bool = False
) -> ir.Module:
    """The op, not yet compiled."""
    module, heights = ir.Module(), tiles(rows, target, masks=columns)
    form = (Extra.COLUMNS if columns else Extra.NOTHING) | (Extra.PAIRS if pairs else Extra.NOTHING)
    built = {count: tile(module, each, count, target, activation, form) for count, each in heights.items()}
    alone = singles(rows, target, columns)
    single = alone and tile(module, heights[alone.count], alone.count, target, activation, form | Extra.SINGLE)
    _op(module, rows, built, heights, (alone, single) if alone else None, target.lanes, form)
    return module


def _op(
    module: ir.Module, rows: int, built: dict[int, ir.Function], heights: dict[int, int],
    single: tuple[Singles, ir.Function] | None, lanes: int, form: Extra,
) -> None:  # fmt: skip
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    chunk, block, image, start, length = place_of(b, item, Field, get)

    def base(slot: Field, offset: Field, stride: Field) -> ir.Value:
        return at(b, address(b, slots, get[slot], get[offset]), b.add(b.mul(image, get[stride]), start))

    x = base(Field.X_SLOT, Field.X_OFFSET, Field.X_IMAGE)
    y = base(Field.Y_SLOT, Field.Y_OFFSET, Field.Y_IMAGE)
    residual = base(Field.RESIDUAL_SLOT, Field.RESIDUAL_OFFSET, Field.RESIDUAL_IMAGE)
    mask, inside = (at(b, pointer_field(b, get[each], INTS), start) for each in (Field.MASK, Field.INSIDE))
    low, high = float_field(b, get[Field.LOW]), float_field(b, get[Field.HIGH])
    pointer = pointer_field(b, get[Field.GROUP_POINTER], INTS)
    first = b.mul(chunk, get[Field.CHUNK])
    last = smaller(b, b.add(first, get[Field.CHUNK]), get[Field.GROUPS])
    channels = pointer_field(b, get[Field.Y_CHANNEL], INTS)
    clear_borders(b, item, block, y, channels, (b.mul(first, const(rows)), b.mul(last, const(rows))), Field, get)

    def work(group: ir.Value, list_: ir.Value, partials: ir.Value, carry: ir.Value) -> None:
        """A group's sums over one list of kept positions, at all positions of the item."""
        begin = long_at(b, pointer, list_)
        kept = b.sub(long_at(b, pointer, b.add(list_, const(1))), begin)
        row0 = b.mul(group, const(rows))
        offsets = at(b, pointer_field(b, get[Field.OFFSETS], INTS), b.mul(begin, const(1 + (Extra.PAIRS in form))))
        values = at(b, pointer_field(b, get[Field.VALUES], FLOATS), b.mul(begin, const(rows)))
        bias = at(b, pointer_field(b, get[Field.BIAS], FLOATS), row0)
        y_channel = at(b, channels, row0)
        residual_channel = at(b, pointer_field(b, get[Field.RESIDUAL_CHANNEL], INTS), row0)
        ends = at(b, pointer_field(b, get[Field.ENDS], INTS), b.mul(list_, get[Field.RUNS]))

        def compute(count: int, position: ir.Value, alone: ir.Value | None = None) -> None:
            """`count` vectors from `position` on, and the single position `alone`."""
            partial = at(b, partials, b.mul(position, const(rows)))
            for row in reversed(range(0, rows, heights[count])):
                step, function = const(row), built[count]
                given = [
                    at(b, x, position), offsets, kept, at(b, values, step), const(rows), at(b, bias, step),
                    at(b, y, position), at(b, y_channel, step), at(b, residual, position),
                    at(b, residual_channel, step), get[Field.RESIDUAL], at(b, mask, position), low, high,
                    at(b, partial, const(row * count * lanes)), carry,
                ]  # fmt: skip
                if alone is not None and single is not None:
                    function = single[1]
                    own = at(b, partials, b.add(b.mul(alone, const(rows)), step))
                    given += [b.sub(alone, position), own]
                if Extra.COLUMNS in form:
                    here = at(b, inside, position)
                    given += [get[Field.RUNS], ends, get[Field.COLUMNS], here, get[Field.INSIDE_LENGTH]]
                b.call(function, given)

        cover(b, length, lanes, max(built), compute, single[0] if single else None)

    partials = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    partials = at(b, partials, b.mul(thread, get[Field.SCRATCH]))
    _by_panel(b, (first, last), get[Field.PANELS], partials, work)
    b.ret_void()


def _by_panel(
    b: ir.IRBuilder, groups: tuple[ir.Value, ir.Value], panels: ir.Value, partials: ir.Value,
    work: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None],
) -> None:  # fmt: skip
    """Calls `work` for each panel of each group; sums are carried in `partials` between the panels of one."""
    final = b.sub(panels, const(1))
    with loop(b, *groups) as group, loop(b, const(0), panels) as panel:
        came = b.select(b.icmp_signed(">", panel, const(0)), const(CARRY_IN), const(0))
        goes = b.select(b.icmp_signed("<", panel, final), const(CARRY_OUT), const(0))
        work(group, b.add(b.mul(group, panels), panel), partials, b.or_(came, goes))
