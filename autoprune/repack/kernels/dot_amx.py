"""The register tile of int8 convolutions by AMX: what `dot_tile.tile` computes, 16 cells by one instruction.

A tile register holds 16 rows of 64 bytes: the weights of a group's rows for 16 cells, what these cells read at 16
positions, or the sums of the rows there. What 16 cells read is copied beside each other first, so that the more rows
share it the more is won: a group of 16 takes half the time of VNNI's, one of 8 gains where it keeps much.

The weights lie as the instruction reads them, see `in_blocks`.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.dot_tile import (
    Cell,
    Ending,
    mixed_cell,
    prefetch_lines,
    store_lines,
    tile_function,
    whole_cell,
)
from autoprune.repack.kernels.ir import I8, I32, at, const, load_vector, loop, store_vector

CELLS = 16  # in a tile register's row, and its most rows
WIDEST = 4  # vectors of positions, each a register of sums
_ROW_BYTES = 64
_WEIGHTS = 4  # number of the register; sums have those below
_INPUTS = (5, 6)  # in turn, so that one is loaded while the other is used

Ints = NDArray[np.int32]


def in_blocks(pointer: Ints, values: Ints) -> tuple[Ints, Ints, Ints]:
    """A weight's cells in blocks of 16, as tiles read them.

    Args:
        pointer: ``(groups + 1,)``; the first cell of each group.
        values: ``(cells, rows)``.

    Returns:
        The first cell of each group, each with a multiple of 16 of them; for each of these the cell whose lanes it
        reads, ``(blocks * 16,)``, the group's first where there are fewer; and the weights, ``(blocks, rows, 16)``, 0
        there.
    """
    kept = np.diff(pointer)
    padded = -(-kept // CELLS) * CELLS
    begins = np.concatenate([[0], padded.cumsum()]).astype(np.int32)
    group = np.repeat(np.arange(len(kept)), padded)
    number = np.arange(len(group)) - begins[group]
    real = number < kept[group]
    cells = (pointer[group] + np.where(real, number, 0)).astype(np.int32)
    blocks = np.where(real[:, None], values[cells], 0).reshape(-1, CELLS, values.shape[1])
    return begins, cells, np.ascontiguousarray(blocks.transpose(0, 2, 1), np.int32)


def configured(b: ir.IRBuilder, rows: int) -> None:
    """Gives the tile registers their shapes, for groups of `rows` rows; `released` must follow."""
    heights = [rows if number <= _WEIGHTS else CELLS for number in range(8)]
    layout = np.zeros(64, np.uint8)
    layout[0] = 1  # the palette
    layout[16:32].view(np.uint16)[:] = _ROW_BYTES
    layout[48:56] = heights
    kind = ir.ArrayType(I8, len(layout))
    shapes = ir.GlobalVariable(b.module, kind, "tile_shapes")
    shapes.linkage, shapes.global_constant, shapes.initializer = "internal", True, ir.Constant(kind, layout.tolist())
    call(b, "ldtilecfg", b.bitcast(shapes, I8.as_pointer()))


def released(b: ir.IRBuilder) -> None:
    """Gives the tile registers back."""
    call(b, "tilerelease")


def tile(module: ir.Module, rows: int, vectors: int, target: Target, ending: Ending, mixed: bool) -> ir.Function:
    """All rows of a group by `vectors` of positions; the group has mixed cells, too, where `mixed`."""
    lanes = target.lanes
    b, given = tile_function(module, f"tile_{rows}x{vectors}")
    words = CELLS * lanes  # of a tile register
    scratch = b.alloca(I32, size=vectors * words)
    scratch.align = _ROW_BYTES
    prefetch_lines(b, given, rows, vectors, ending, lanes)
    for v in range(vectors):
        call(b, "tilezero", tile_number(v))

    def walk(kept: ir.Value, weights: ir.Value, read: Cell) -> None:
        """Adds `kept` cells to the sums, which stay in tile registers."""
        with loop(b, const(0), kept, CELLS) as first:
            for cell in range(CELLS):
                for v, value in enumerate(read(b, given, b.add(first, const(cell)), vectors, target)):
                    store_vector(b, value, at(b, scratch, const(v * words + cell * lanes)), lanes)
            move(b, "tileloadd64", _WEIGHTS, at(b, weights, b.mul(first, const(rows))))
            for v in range(vectors):
                inputs = _INPUTS[v % 2]
                move(b, "tileloadd64", inputs, at(b, scratch, const(v * words)))
                call(b, "tdpbsud", *map(tile_number, (v, _WEIGHTS, inputs)))

    walk(given.kept, given.weights, whole_cell)
    if mixed:
        walk(given.mixed_kept, given.mixed_weights, mixed_cell)
    for v in range(vectors):
        move(b, "tilestored64", v, at(b, scratch, const(v * words)))
    places = [const(v * words + row * lanes) for row in range(rows) for v in range(vectors)]
    sums = [load_vector(b, at(b, scratch, place), lanes) for place in places]
    store_lines(b, sums, given, rows, vectors, ending, lanes)
    b.ret_void()
    return b.function


def tile_number(register: int) -> ir.Constant:
    """A tile register, as instructions name it."""
    return ir.Constant(I8, register)


def move(b: ir.IRBuilder, name: str, register: int, place: ir.Value) -> None:
    """Rows of 64 bytes that follow each other, from memory or to it."""
    call(b, name, tile_number(register), b.bitcast(place, I8.as_pointer()), const(_ROW_BYTES))


def call(b: ir.IRBuilder, name: str, *given: ir.Value) -> None:
    """An instruction of AMX."""
    full = f"llvm.x86.{name}"
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in given])
    b.call(b.module.globals.get(full) or ir.Function(b.module, kind, full), given)
