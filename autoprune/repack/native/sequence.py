"""Runs a sequence of native ops with one call, by one thread or several.

Each thread has its share of an op's items, neighbours, and as far as can be the same in every op: what it computed is
what it reads next. Then it takes what the others have left, and goes on to the next op when all items are done, so a
thread that is late, or that the system takes away between two items, holds up nobody.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import llvmlite.ir as ir
import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels.compiler import compile_op, host, once_a_process
from autoprune.repack.kernels.ir import I64, LONGS, at, const, loop
from autoprune.repack.native.op import NativeOp

LINE = 8  # int64 in a cache line
_SPINS = 4000  # looks at a counter before the thread gives its core away
RUN = ir.FunctionType(ir.VoidType(), [LONGS, I64, I64, LONGS, LONGS, I64, I64, I64])  # see `runner_address`


@once_a_process
def runner_address() -> int:
    """Of the native run(table, first, last, slots, counters, thread, threads, give_way)."""
    module = ir.Module()
    function = ir.Function(module, RUN, "run")
    table, first, last, slots, counters, thread, threads, give_way = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    op_kind = ir.FunctionType(ir.VoidType(), [LONGS, LONGS, I64, I64]).as_pointer()
    idle = b.inttoptr(give_way, ir.FunctionType(ir.VoidType(), []).as_pointer())
    with loop(b, first, last) as index:
        row = at(b, table, b.mul(index, const(3)))
        kernel = b.inttoptr(b.load(row), op_kind)
        fields = b.inttoptr(b.load(at(b, row, const(1))), LONGS)
        items = b.load(at(b, row, const(2)))
        own = at(b, counters, b.mul(b.mul(index, b.add(threads, const(1))), const(LINE)))
        run_items(b, Work(kernel, fields, slots, items), own, thread, threads, idle)
    b.ret_void()
    return compile_op(module, "run", host())


class Work(NamedTuple):
    """An op in a native function: its kernel, fields, slots and items."""

    kernel: ir.Value
    fields: ir.Value
    slots: ir.Value
    items: ir.Value


def run_items(
    b: ir.IRBuilder, work: Work, counters: ir.Value, thread: ir.Value, threads: ir.Value, idle: ir.Value
) -> None:
    """All items of an op, or what none of the other `threads` does of them; done when all are.

    `counters`: `LINE` int64 for each thread and for all, of this op alone, zeros at first; unused with one thread.
    """
    with b.if_else(b.icmp_signed("==", threads, const(1))) as (alone, shared):
        with alone, loop(b, const(0), work.items) as item:
            b.call(work.kernel, [work.fields, work.slots, item, thread])
        with shared:
            done = at(b, counters, b.mul(threads, const(LINE)))
            with loop(b, const(0), threads) as turn:
                share = b.srem(b.add(thread, turn), threads)
                begin, end = (b.sdiv(b.mul(work.items, part), threads) for part in (share, b.add(share, const(1))))
                _take(b, work, (begin, end), at(b, counters, b.mul(share, const(LINE))), done, thread)
            _wait(b, done, work.items, idle)


@cache
def runner() -> Any:
    """The same, to be called from Python."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 8)(runner_address())


def _take(
    b: ir.IRBuilder, work: Work, share: tuple[ir.Value, ir.Value], ticket: ir.Value, done: ir.Value, thread: ir.Value
) -> None:
    """Works on the items of a share as long as there are any."""
    before = b.block
    head, body, end = (b.append_basic_block(name) for name in ("take", "work", "taken"))
    b.branch(head)
    b.position_at_end(head)
    count = b.phi(I64)
    count.add_incoming(const(0), before)
    item = b.add(share[0], b.atomic_rmw("add", ticket, const(1), "acq_rel"))
    b.cbranch(b.icmp_signed("<", item, share[1]), body, end)
    b.position_at_end(body)
    b.call(work.kernel, [work.fields, work.slots, item, thread])
    count.add_incoming(b.add(count, const(1)), body)
    b.branch(head)
    b.position_at_end(end)
    with b.if_then(b.icmp_signed(">", count, const(0))):  # told at once: a line that others look at is slow to write
        b.atomic_rmw("add", done, count, "acq_rel")


def _wait(b: ir.IRBuilder, done: ir.Value, items: ir.Value, idle: ir.Value) -> None:
    """Until every item is done."""
    before = b.block
    head, again, way, end = (b.append_basic_block(name) for name in ("wait", "again", "way", "waited"))
    b.branch(head)
    b.position_at_end(head)
    spins = b.phi(I64)
    spins.add_incoming(const(0), before)
    finished = b.load_atomic(done, "acquire", 8)
    b.cbranch(b.icmp_signed(">=", finished, items), end, again)
    b.position_at_end(again)
    more = b.add(spins, const(1))
    b.cbranch(b.icmp_signed("<", more, const(_SPINS)), head, way)
    spins.add_incoming(more, again)
    b.position_at_end(way)
    b.call(idle, [])
    b.branch(head)
    spins.add_incoming(const(0), way)
    b.position_at_end(end)


@cache
def give_way() -> int:
    """The address of the system's function that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


class NativeSequence:
    """Ops that run one after another."""

    def __init__(self, ops: Sequence[NativeOp]) -> None:
        self.ops = tuple(ops)
        rows = [(op.kernel.address, op.fields.ctypes.data, op.items) for op in self.ops]
        self._table = np.array(rows, np.int64).reshape(len(rows), 3)
        self.address = self._table.ctypes.data
        self._run = runner()
        self._idle = give_way()

    def new_counters(self, threads: int) -> NDArray[np.int64]:
        """The shared counters of up to so many threads for one call at a time."""
        return np.zeros(max(1, len(self.ops)) * (threads + 1) * LINE, np.int64)

    def job(self, slots: int, counters: int, threads: int) -> tuple[int, int, int, int, int]:
        """All ops, for the helpers of a team; `slots` and `counters` are addresses."""
        return self.address, len(self.ops), slots, counters, threads

    def run(self, slots: int, counters: int = 0, thread: int = 0, threads: int = 1) -> None:
        """Runs all ops, or what nobody else does of them. Returns when all items of the last op are done."""
        self._run(self.address, 0, len(self.ops), slots, counters, thread, threads, self._idle)

    def run_op(self, index: int, slots: int) -> None:
        """Runs one op alone, for timing it; what it reads must have been computed."""
        self._run(self.address, index, index + 1, slots, 0, 0, 1, self._idle)
