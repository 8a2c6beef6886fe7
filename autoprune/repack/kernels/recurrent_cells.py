"""The arithmetic of LSTM and GRU: from the gates of some units to their cells and states."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import llvmlite.ir as ir

from autoprune.repack.kernels.ir import I32, at, const, fma, load_vector
from autoprune.repack.kernels.math import copysign, exp, exp_falling, splat_float


def together(lanes: int) -> int:
    """Vectors of units whose cells are computed side by side: each is a long chain, with a dozen constants.

    Narrow vectors leave no registers for more than one: their gates' exponentials are chains enough.
    """
    return 1 if lanes == 4 else 4


def gates_of(b: ir.IRBuilder, pointer: ir.Value, gates: int, wide: int) -> list[ir.Value]:
    """The gates of `wide` units, a vector each, from memory where those of a unit are neighbours."""
    if wide == 1:
        return [b.load(at(b, pointer, const(gate))) for gate in range(gates)]
    mixed = load_vector(b, pointer, gates * wide)
    undefined = ir.Constant(mixed.type, ir.Undefined)
    kind = ir.VectorType(I32, wide)
    places = ([gate + gates * unit for unit in range(wide)] for gate in range(gates))
    return [b.shuffle_vector(mixed, undefined, ir.Constant(kind, place)) for place in places]


def _decay(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> tuple[ir.Value, ir.Value]:
    """Numerator and denominator of tanh(x): 1 - e, with the sign of x, and 1 + e, for e = exp(-2|x|)."""
    one = splat_float(1.0, lanes)
    e = exp_falling(b, module, copysign(b, module, x, one, lanes), lanes, -2.0)
    return copysign(b, module, b.fsub(one, e), x, lanes), b.fadd(one, e)


def _against(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """The denominator of a sigmoid: 1 + exp(-x)."""
    return b.fadd(splat_float(1.0, lanes), exp(b, module, x, lanes, -1.0))


Cell = Callable[[ir.IRBuilder, ir.Module, list[ir.Value], list[ir.Value], ir.Value, int], tuple[ir.Value, ir.Value]]


def _lstm(
    b: ir.IRBuilder, module: ir.Module, given: list[ir.Value], learned: list[ir.Value], cell: ir.Value, lanes: int
) -> tuple[ir.Value, ir.Value]:
    """Cell and state; each product of a sigmoid and a tanh takes one division."""
    opened, kept, new, shown = (b.fadd(one, other) for one, other in zip(given, learned, strict=True))
    size, rest = _decay(b, module, new, lanes)
    written = b.fdiv(size, b.fmul(rest, _against(b, module, opened, lanes)))
    cell = b.fadd(b.fdiv(cell, _against(b, module, kept, lanes)), written)
    size, rest = _decay(b, module, cell, lanes)
    return cell, b.fdiv(size, b.fmul(rest, _against(b, module, shown, lanes)))


def _gru(
    b: ir.IRBuilder, module: ir.Module, given: list[ir.Value], learned: list[ir.Value], cell: ir.Value, lanes: int
) -> tuple[ir.Value, ir.Value]:
    reset = b.fdiv(splat_float(1.0, lanes), _against(b, module, b.fadd(given[0], learned[0]), lanes))
    size, rest = _decay(b, module, b.call(fma(module, lanes), [reset, learned[2], given[2]]), lanes)
    new = b.fdiv(size, rest)
    carried = b.fdiv(b.fsub(cell, new), _against(b, module, b.fadd(given[1], learned[1]), lanes))
    state = b.fadd(new, carried)
    return state, state


CELLS: Mapping[str, Cell] = {"lstm": _lstm, "gru": _gru}
