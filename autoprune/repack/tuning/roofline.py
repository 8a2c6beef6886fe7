"""What this machine can do at most: fused multiply-adds and bytes read a second, measured with loops of nothing else.

The two roofs of S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import llvmlite.ir as ir
import torch

from autoprune.latency.timer import Clock
from autoprune.repack.kernels.compiler import compile_function, host, once_a_process
from autoprune.repack.kernels.ir import FLOATS, I64, at, const, fma, load_vector, store_vector

CHAINS = 12  # independent sums: more than latency times issue width of any core needs
FMA_ROUNDS = 1_000_000  # about two milliseconds: what it takes to start a thread does not count
SAMPLES = 20
FEW_SAMPLES = 4  # where one takes tens of milliseconds
MEMORY_BYTES = 1 << 27  # beyond the last-level cache that a core shares
L3_BYTES = 1 << 22  # beyond a core's own caches, within the shared one
READ_BYTES = 1 << 25  # a sample reads at least this much: some milliseconds

Kernel = Callable[..., None]
Step = Callable[[ir.Value, Sequence[ir.Value]], list[ir.Value]]


def fma_gflops(threads: int = 1, clock: Clock = time.perf_counter) -> float:
    """GFLOP/s that `threads` cores reach together with independent float32 multiply-adds of full vectors.

    The best of a few milliseconds' samples: a share of it is a share of what the machine can do when it is quiet.
    """
    kernel, floats = _fma_loop(), CHAINS * host().lanes
    numbers = torch.zeros(threads, floats)
    rows = [row.data_ptr() for row in numbers]
    flops = 2 * floats * FMA_ROUNDS * threads
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            list(pool.map(kernel, rows))

        return flops / _fastest_s(run, clock) / 1e9


def memory_gbs(clock: Clock = time.perf_counter) -> float:
    """GB/s that one core reads from memory."""
    return _read_gbs(MEMORY_BYTES, clock)


def l3_gbs(clock: Clock = time.perf_counter) -> float:
    """GB/s that one core reads from data that fit the shared cache but not its own."""
    return _read_gbs(L3_BYTES, clock)


def _read_gbs(size: int, clock: Clock) -> float:
    # Not zeros: the system would give one page of them for all.
    kernel, numbers, sums = _read_loop(), torch.ones(size // 4), torch.zeros(CHAINS * host().lanes)
    blocks, rounds = numbers.numel() // sums.numel(), max(1, READ_BYTES // size)

    def run() -> None:
        kernel(numbers.data_ptr(), sums.data_ptr(), blocks, rounds)

    samples = SAMPLES if rounds > 1 else FEW_SAMPLES
    return 4 * sums.numel() * blocks * rounds / _fastest_s(run, clock, samples) / 1e9


def _fastest_s(run: Callable[[], None], clock: Clock, samples: int = SAMPLES) -> float:
    run()  # warms up: threads, page tables, clock speed
    times = []
    for _ in range(samples):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


@once_a_process
def _fma_loop() -> Kernel:
    """fmas(numbers): CHAINS sums over FMA_ROUNDS rounds."""
    target, module = host(), ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS]), "fmas")
    b, fused = ir.IRBuilder(function.append_basic_block("entry")), fma(module, target.lanes)
    places = _places(b, function.args[0], target.lanes)
    start = [load_vector(b, place, target.lanes) for place in places]

    def add(_: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        return [b.call(fused, [total, start[0], start[1]]) for total in sums]

    for place, total in zip(places, _repeat(b, const(FMA_ROUNDS), start, add), strict=True):
        store_vector(b, total, place, target.lanes)
    b.ret_void()
    return compile_function(module, "fmas", target, 1)


@once_a_process
def _read_loop() -> Kernel:
    """reads(numbers, sums, blocks, rounds): adds up `blocks` times CHAINS vectors, `rounds` times over."""
    target, module = host(), ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS, FLOATS, I64, I64]), "reads")
    numbers, sums_at, blocks, rounds = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    places = _places(b, sums_at, target.lanes)

    def block(index: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        block_at = at(b, numbers, b.mul(index, const(CHAINS * target.lanes)))
        read = [load_vector(b, place, target.lanes) for place in _places(b, block_at, target.lanes)]
        return [b.fadd(total, value) for total, value in zip(sums, read, strict=True)]

    def all_blocks(_: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        return _repeat(b, blocks, sums, block)

    start = [load_vector(b, place, target.lanes) for place in places]
    for place, total in zip(places, _repeat(b, rounds, start, all_blocks), strict=True):
        store_vector(b, total, place, target.lanes)
    b.ret_void()
    return compile_function(module, "reads", target, 4)


def _places(b: ir.IRBuilder, pointer: ir.Value, lanes: int) -> list[ir.Value]:
    return [at(b, pointer, const(lanes * i)) for i in range(CHAINS)]


def _repeat(b: ir.IRBuilder, count: ir.Value, start: Sequence[ir.Value], step: Step) -> list[ir.Value]:
    """``for k in range(count): sums = step(k, sums)`` in registers, for a count of at least 1."""
    before, body, done = b.block, b.append_basic_block("body"), b.append_basic_block("done")
    b.branch(body)
    b.position_at_end(body)
    carried = [b.phi(kind) for kind in (I64, *(each.type for each in start))]
    after = step(carried[0], carried[1:])
    following = b.add(carried[0], const(1))
    for phi, first, later in zip(carried, [const(0), *start], [following, *after], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.cbranch(b.icmp_signed("<", following, count), body, done)
    b.position_at_end(done)
    return after
