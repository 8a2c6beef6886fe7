"""Where a helper finds its next job: native, so that giving one and seeing it take less than a microsecond.

A box is an array of int64: how many jobs its owner was given, how many it is through with, and the last one, which is
written only while both are the same, so that it is never read half. The owner looks again and again for a while,
letting other threads have its core in between, then says that it sleeps and returns.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import compile_op, host, once_a_process
from autoprune.repack.kernels.ir import I64, LONGS, at, const
from autoprune.repack.native.sequence import LINE, RUN, give_way, runner_address

GIVEN, SLEEPS, JOB = 0, 1, 2  # places in a box; the job has five entries
TAKEN = LINE  # in a line of its own, which the owner alone writes
SIZE = 2 * LINE
AWAKE, ASLEEP = 0, 1
_JOB = 5  # table, ops, slots, counters, threads
_LOOKS = 64  # at a box, before the owner gives its core away
_PATIENCE = 1000  # times it does so: about half a millisecond where nobody else wants the core


def give(box: int, *job: int) -> bool:
    """Gives the owner of a box, who is through with all it was given, a job; whether it sleeps and must be woken."""
    return bool(_give()(box, *job))


def serve(box: int, thread: int) -> None:
    """Does the jobs that come, as number `thread` of their threads, until none has come for a while."""
    _serve()(box, thread)


@once_a_process
def _give() -> Any:
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(I64, [LONGS] + [I64] * _JOB), "give")
    box, *job = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    for index, value in enumerate(job):
        b.store(value, at(b, box, const(JOB + index)))
    given = at(b, box, const(GIVEN))
    b.store_atomic(b.add(b.load(given), const(1)), given, "seq_cst", 8)
    b.ret(b.atomic_rmw("xchg", at(b, box, const(SLEEPS)), const(AWAKE), "seq_cst"))
    # Giving up the interpreter's lock would take longer than the work.
    return ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (1 + _JOB))(compile_op(module, "give", host()))


@once_a_process
def _serve() -> Any:
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONGS, I64]), "serve")
    box, thread = function.args
    names = ("entry", "wait", "look", "again", "way", "tired", "late", "work")
    entry, wait, look, again, way, tired, late, work = (function.append_basic_block(name) for name in names)
    b = ir.IRBuilder(entry)
    given, sleeps, taken = (at(b, box, const(place)) for place in (GIVEN, SLEEPS, TAKEN))
    idle = b.inttoptr(const(give_way()), ir.FunctionType(ir.VoidType(), []).as_pointer())
    run = b.inttoptr(const(runner_address()), RUN.as_pointer())
    b.branch(wait)

    b.position_at_end(wait)
    through = b.load(taken)
    b.branch(look)

    b.position_at_end(look)
    looks = b.phi(I64)
    looks.add_incoming(const(0), wait)
    b.cbranch(b.icmp_signed("!=", b.load_atomic(given, "acquire", 8), through), work, again)

    b.position_at_end(again)
    more = b.add(looks, const(1))
    looks.add_incoming(more, again)
    b.cbranch(b.icmp_signed("!=", b.srem(more, const(_LOOKS)), const(0)), look, way)

    b.position_at_end(way)
    b.call(idle, [])
    looks.add_incoming(more, way)
    b.cbranch(b.icmp_signed("<", more, const(_LOOKS * _PATIENCE)), look, tired)

    b.position_at_end(tired)  # says so, and looks once more: a job may have come in between
    b.atomic_rmw("xchg", sleeps, const(ASLEEP), "seq_cst")
    with b.if_then(b.icmp_signed("==", b.load_atomic(given, "seq_cst", 8), through)):
        b.ret_void()
    b.branch(late)

    b.position_at_end(late)  # whoever gave the job may have seen it asleep: then the waking is on its way
    seen = b.atomic_rmw("xchg", sleeps, const(AWAKE), "seq_cst")
    with b.if_then(b.icmp_signed("==", seen, const(AWAKE))):
        b.ret_void()
    b.branch(work)

    b.position_at_end(work)
    table, ops, slots, counters, threads = (b.load(at(b, box, const(JOB + index))) for index in range(_JOB))
    slots, counters, table = (b.inttoptr(each, LONGS) for each in (slots, counters, table))
    b.call(run, [table, const(0), ops, slots, counters, thread, threads, const(give_way())])
    b.store_atomic(b.add(through, const(1)), taken, "release", 8)
    b.branch(wait)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(compile_op(module, "serve", host()))
