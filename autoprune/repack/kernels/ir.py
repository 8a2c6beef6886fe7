"""A few words of LLVM IR: loops as context managers, vectors, splats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import llvmlite.ir as ir

F32, I8, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS, INTS, LONGS = F32.as_pointer(), I32.as_pointer(), I64.as_pointer()
PAGE_FLOATS = 1024


def const(value: int) -> ir.Constant:
    """An i64."""
    return ir.Constant(I64, value)


@contextmanager
def loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
    """``for i in range(start, stop, step)``; the block is the body and gets i."""
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", i, stop), body, done)
    b.position_at_end(body)
    yield i
    i.add_incoming(b.add(i, const(step)), b.block)
    b.branch(head)
    b.position_at_end(done)


def fold(
    b: ir.IRBuilder, start: ir.Value, stop: ir.Value, values: Sequence[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]], step: int = 1,
) -> list[ir.Value]:  # fmt: skip
    """``for i in range(start, stop, step): values = body(i, values)``; what the last turn leaves."""
    before = b.block
    head, turn, done = (b.append_basic_block(name) for name in ("fold", "turn", "folded"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    held = [b.phi(value.type) for value in values]
    for phi, value in zip(held, values, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", i, stop), turn, done)
    b.position_at_end(turn)
    made = body(i, list(held))
    for phi, value in zip(held, made, strict=True):
        phi.add_incoming(value, b.block)
    i.add_incoming(b.add(i, const(step)), b.block)
    b.branch(head)
    b.position_at_end(done)
    return list(held)


def gathered(b: ir.IRBuilder, places: Sequence[ir.Value]) -> ir.Value:
    """A vector of what lies at `places`."""
    vector_ = ir.Constant(ir.VectorType(places[0].type.pointee, len(places)), ir.Undefined)
    for lane, place in enumerate(places):
        vector_ = b.insert_element(vector_, b.load(place), ir.Constant(I32, lane))
    return vector_


def spans(
    b: ir.IRBuilder, first: ir.Value, last: ir.Value, widths: Iterable[int], body: Callable[[ir.Value, int], None]
) -> None:
    """``body(start, width)`` over ``range(first, last)``: as many of the first width as fit, then of the next."""
    start = first
    for width in dict.fromkeys(widths):
        stop = b.add(start, b.mul(b.sdiv(b.sub(last, start), const(width)), const(width)))
        with loop(b, start, stop, width) as position:
            body(position, width)
        start = stop


ZERO = ir.Constant(F32, 0.0)


def clear(b: ir.IRBuilder, pointer: ir.Value, count: ir.Value, value: ir.Value = ZERO) -> None:
    """Sets `count` entries to `value`."""
    with loop(b, const(0), count) as i:
        b.store(value, at(b, pointer, i))


def clear_border(
    b: ir.IRBuilder, channel: ir.Value, number: ir.Value, border: tuple[ir.Value, ir.Value, ir.Value],
    value: ir.Value = ZERO,
) -> None:  # fmt: skip
    """Sets what lies around a channel's positions to `value`, where other maps lay before.

    `number` is 0 for the map's first channel. `border`: how many positions, entries behind them, and before the first
    channel.
    """
    positions, behind, before = border
    clear(b, at(b, channel, positions), behind, value)
    with b.if_then(b.icmp_signed("==", number, const(0))):
        clear(b, at(b, channel, b.neg(before)), before, value)


def smaller(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def at(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value) -> ir.Value:
    """``pointer + index``, in elements."""
    return b.gep(pointer, [index])


def long_at(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value) -> ir.Value:
    """The int32 at ``pointer[index]``, widened."""
    return b.sext(b.load(at(b, pointer, index)), I64)


def vector(lanes: int) -> ir.Type:
    """``lanes`` floats; a plain float for one lane."""
    return ir.VectorType(F32, lanes) if lanes > 1 else F32


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    if lanes == 1:
        return scalar
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), None))


def broadcast(b: ir.IRBuilder, pointer: ir.Value, count: int, lanes: int, by_lane: bool) -> Iterator[ir.Value]:
    """A vector of each of the `count` entries at `pointer`: of lanes of a loaded vector where `by_lane`."""
    for first in range(0, count, wide := min(count, lanes) if by_lane else 1):
        held = load_vector(b, at(b, pointer, const(first)), wide)
        for lane in range(wide):
            yield splat(b, held, lanes) if wide == 1 else lanes_at(b, held, [lane] * lanes)


def lanes_at(b: ir.IRBuilder, held: ir.Value, places: Sequence[int]) -> ir.Value:
    """The lanes of `held` at `places`."""
    chosen = ir.Constant(ir.VectorType(I32, len(places)), list(places))
    return b.shuffle_vector(held, ir.Constant(held.type, ir.Undefined), chosen)


def load_vector(b: ir.IRBuilder, pointer: ir.Value, lanes: int) -> ir.Value:
    """`lanes` floats from `pointer`, or of what it points to, which need not be aligned to more than one of them."""
    kind = pointer.type.pointee
    loaded = b.load(b.bitcast(pointer, (ir.VectorType(kind, lanes) if lanes > 1 else kind).as_pointer()))
    loaded.align = 1 if kind == I8 else 4
    return loaded


def masked_load(b: ir.IRBuilder, module: ir.Module, pointer: ir.Value, wanted: ir.Value, lanes: int) -> ir.Value:
    """`lanes` floats from `pointer`, zero where the bits of `wanted` are; what lies there is not touched."""
    kind, bits = vector(lanes), ir.VectorType(ir.IntType(1), lanes)
    place = b.bitcast(pointer, kind.as_pointer())
    name = f"llvm.masked.load.v{lanes}f32.p0v{lanes}f32"
    signature = ir.FunctionType(kind, [place.type, I32, bits, kind])
    function = module.globals.get(name) or ir.Function(module, signature, name)
    return b.call(function, [place, ir.Constant(I32, 4), wanted, ir.Constant(kind, None)])


def masked_store(
    b: ir.IRBuilder, module: ir.Module, value: ir.Value, pointer: ir.Value, wanted: ir.Value, lanes: int
) -> None:
    """Stores the floats where the bits of `wanted` are set; nothing else is touched."""
    kind, bits = vector(lanes), ir.VectorType(ir.IntType(1), lanes)
    place = b.bitcast(pointer, kind.as_pointer())
    name = f"llvm.masked.store.v{lanes}f32.p0v{lanes}f32"
    signature = ir.FunctionType(ir.VoidType(), [kind, place.type, I32, bits])
    function = module.globals.get(name) or ir.Function(module, signature, name)
    b.call(function, [value, place, ir.Constant(I32, 4), wanted])


def store_vector(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, lanes: int) -> None:
    """Stores `lanes` floats, or other numbers, which need not be aligned to more than one of them."""
    kind = ir.VectorType(value.type.element, lanes) if lanes > 1 else value.type
    stored = b.store(value, b.bitcast(pointer, kind.as_pointer()))
    stored.align = 1 if I8 in (value.type, getattr(value.type, "element", None)) else 4


class RoundsOnce(ir.Module):  # type: ignore[misc]
    """A module for a processor without a fused multiply-add, in which `fma` has one rounding all the same.

    That takes about ten instructions: it is for what becomes bytes, which are the same on all processors.
    """

    def fma(self, lanes: int) -> ir.Function:
        """Like ``llvm.fma``, by doubles: their product is exact, and their sum is rounded to odd before it is a float.

        Where the sum is not exact, its last bit is made 1: then the second rounding is that of the exact sum.
        """
        kind, name = vector(lanes), f"fma_{lanes}"
        if name in self.globals:
            return self.globals[name]
        wide, bits = (ir.VectorType(each, lanes) if lanes > 1 else each for each in (ir.DoubleType(), I64))

        def number(value: int) -> ir.Constant:
            return ir.Constant(bits, [value] * lanes if lanes > 1 else value)

        function = ir.Function(self, ir.FunctionType(kind, [kind] * 3), name)
        function.linkage = "internal"
        b = ir.IRBuilder(function.append_basic_block("entry"))
        x, y, added = (b.fpext(each, wide) for each in function.args)
        product = b.fmul(x, y)
        total = b.fadd(product, added)
        taken = b.fsub(total, product)
        error = b.fadd(b.fsub(product, b.fsub(total, taken)), b.fsub(added, taken))
        zero, found = b.bitcast(number(0), wide), b.bitcast(total, bits)
        away = b.icmp_signed(">=", b.xor(b.bitcast(error, bits), found), number(0))  # error and sum have one sign
        odd = b.add(found, b.select(away, number(1), number(-1)))
        inexact = b.and_(b.fcmp_ordered("!=", error, zero), b.icmp_signed("==", b.and_(found, number(1)), number(0)))
        b.ret(b.fptrunc(b.bitcast(b.select(inexact, odd, found), wide), kind))
        return function


def module_of_bytes(fused: bool) -> ir.Module:
    """A module in which `fma` has one rounding, whether the processor is `fused` or not."""
    return ir.Module() if fused else RoundsOnce()


def fma(module: ir.Module, lanes: int) -> ir.Function:
    """``llvm.fma`` for `lanes` floats, declared once a module; two roundings on processors that have no such thing."""
    if isinstance(module, RoundsOnce):
        return module.fma(lanes)
    name = f"llvm.fma.v{lanes}f32" if lanes > 1 else "llvm.fma.f32"
    kind = vector(lanes)
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [kind] * 3), name)


def op_function(module: ir.Module) -> tuple[ir.IRBuilder, ir.Value, ir.Value, ir.Value, ir.Value]:
    """Starts the native op ``op(fields, slots, item, thread)``: builder and arguments."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONGS, LONGS, I64, I64]), "op")
    return ir.IRBuilder(function.append_basic_block("entry")), *function.args


def inner_function(module: ir.Module, name: str, kinds: Sequence[ir.Type]) -> ir.Function:
    """A function that an op calls from several places; inlining it would take three times as long to compile."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function


def address(b: ir.IRBuilder, slots: ir.Value, slot: ir.Value, offset: ir.Value) -> ir.Value:
    """The floats `offset` bytes into the buffer in `slot`."""
    return b.inttoptr(b.add(b.load(at(b, slots, slot)), offset), FLOATS)


def pointer_field(b: ir.IRBuilder, value: ir.Value, kind: ir.Type) -> ir.Value:
    """A field that holds an address."""
    return b.inttoptr(value, kind)


def float_field(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A field that holds a float's bits."""
    return b.bitcast(b.trunc(value, I32), F32)


def prefetch(b: ir.IRBuilder, module: ir.Module, pointer: ir.Value, write: bool = False) -> None:
    """Asks for the cache line at `pointer`; harmless whatever the address."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    name = "llvm.prefetch.p0i8"
    function = module.globals.get(name) or ir.Function(module, kind, name)
    b.call(function, [b.bitcast(pointer, I8.as_pointer()), *(ir.Constant(I32, n) for n in (int(write), 3, 1))])


def prefetch_ahead(b: ir.IRBuilder, module: ir.Module, pointer: ir.Value) -> None:
    """Asks for what lies a page behind `pointer`: where a page ends, the hardware stops fetching by itself."""
    prefetch(b, module, at(b, pointer, const(PAGE_FLOATS)))


def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


def clamp(b: ir.IRBuilder, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """Between `low` and `high`; NaN stays NaN, as in torch."""
    value = b.select(b.fcmp_ordered("<", value, low), low, value)
    return b.select(b.fcmp_ordered(">", value, high), high, value)


def masked(b: ir.IRBuilder, value: ir.Value, mask: ir.Value, lanes: int) -> ir.Value:
    """`value` where the int32s at `mask` are -1, zero where they are 0, whatever `value` is there."""
    integers = ir.VectorType(I32, lanes)
    kept = b.load(b.bitcast(mask, integers.as_pointer()))
    kept.align = 4
    return b.bitcast(b.and_(b.bitcast(value, integers), kept), vector(lanes))


def load_mask(b: ir.IRBuilder, pointer: ir.Value, lanes: int) -> ir.Value:
    """Bits of the int32s at `pointer`, -1 or 0 each."""
    integers = ir.VectorType(I32, lanes) if lanes > 1 else I32
    given = b.load(b.bitcast(pointer, integers.as_pointer()))
    given.align = 4
    return b.icmp_signed("!=", given, ir.Constant(integers, None if lanes > 1 else 0))


def kept_by(b: ir.IRBuilder, value: ir.Value, bits: ir.Value | None) -> ir.Value:
    """`value` where `bits` are set, zero elsewhere, whatever `value` is there; all of it where they are None."""
    if bits is None:
        return value
    zero = ir.Constant(value.type, 0.0) if value.type == F32 else ir.Constant(value.type, None)
    return b.select(bits, value, zero)


def picked(b: ir.IRBuilder, vectors: list[ir.Value], first: int, stride: int, lanes: int) -> ir.Value:
    """Of the floats in `vectors`, one after the other: `lanes` of them from `first` on, `stride` apart."""
    picked: ir.Value = ir.Constant(vector(lanes), ir.Undefined)
    places = [first + lane * stride for lane in range(lanes)]
    for number in range(places[0] // lanes, places[-1] // lanes + 1):
        here = [lanes + place % lanes if place // lanes == number else lane for lane, place in enumerate(places)]
        picked = b.shuffle_vector(picked, vectors[number], ir.Constant(ir.VectorType(I32, lanes), here))
    return picked
