"""A set-associative cache that replaces what was used least recently, as a native function."""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import compile_function, host, once_a_process
from autoprune.repack.kernels.ir import I8, I64, LONGS, at, const, loop


@once_a_process
def lru() -> Callable[..., None]:
    """``lru(lines, count, sets, ways, tags, missed)``: looks up `count` lines one after another.

    `lines` are int64; `tags` is int64 ``(sets, ways)``, most recent first, -1 where nothing is, and is updated;
    `missed` is uint8 ``(count,)`` and becomes 1 where a line was not there.
    """
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [LONGS, I64, I64, I64, LONGS, I8.as_pointer()])
    function = ir.Function(module, kind, "lru")
    lines, count, sets, ways, tags, missed = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    with loop(b, const(0), count) as number:
        line = b.load(at(b, lines, number))
        row = at(b, tags, b.mul(b.urem(line, sets), ways))
        before = b.block
        head, shift, found, evicted, done = (
            b.append_basic_block(name) for name in ("look", "shift", "found", "evicted", "looked")
        )
        b.branch(head)
        b.position_at_end(head)  # every tag moves one place back until the line itself, or the oldest, falls out
        way, carried = b.phi(I64), b.phi(I64)
        way.add_incoming(const(0), before)
        carried.add_incoming(line, before)
        b.cbranch(b.icmp_signed("<", way, ways), shift, evicted)
        b.position_at_end(shift)
        place = at(b, row, way)
        tag = b.load(place)
        b.store(carried, place)
        way.add_incoming(b.add(way, const(1)), shift)
        carried.add_incoming(tag, shift)
        b.cbranch(b.icmp_signed("==", tag, line), found, head)
        b.position_at_end(found)
        b.store(ir.Constant(I8, 0), at(b, missed, number))
        b.branch(done)
        b.position_at_end(evicted)
        b.store(ir.Constant(I8, 1), at(b, missed, number))
        b.branch(done)
        b.position_at_end(done)
    b.ret_void()
    return compile_function(module, "lru", host(), 6)
