"""What this machine can do at most: products and sums, and bytes read, a second, measured with loops of nothing else.

The two roofs of S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import llvmlite.ir as ir
import torch
from llvmlite import binding

from autoprune.latency.timer import Clock
from autoprune.repack.kernels import dot_amx
from autoprune.repack.kernels.compiler import compile_function, host, once_a_process
from autoprune.repack.kernels.dot_products import dot
from autoprune.repack.kernels.ir import FLOATS, I32, I64, at, const, fma, load_vector, loop, store_vector, vector

CHAINS = 12  # independent sums: more than latency times issue width of any core needs
ROUNDS = 1_000_000  # about two milliseconds: what it takes to start a thread does not count
TILES = 6  # independent sums in tile registers: the other two are multiplied
TILE_LANES = 16 * 16  # sums in a tile, or lanes of four bytes
TILE_PRODUCTS = 4 * 16 * TILE_LANES  # that one instruction adds to a tile of sums
TILE_ROUNDS = 50_000  # about two milliseconds, too
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
    return _chains_gops(_fma_loop(), 1, threads, clock)


def int8_gops(threads: int = 1, clock: Clock = time.perf_counter) -> float | None:
    """Billions of products and sums that `threads` cores reach together with products of bytes.

    By the best instruction that kernels use here, `int8_instruction`; None where the CPU has none for bytes.
    """
    instruction = int8_instruction()
    if instruction == "AMX":
        return _peak_gops(_amx_loop(), TILES * TILE_PRODUCTS * TILE_ROUNDS, threads, clock)
    return _chains_gops(_int8_loop(), 4, threads, clock) if instruction == "VNNI" else None


def int8_instruction() -> Literal["AMX", "VNNI"] | None:
    """What multiplies bytes on this machine: tiles of them, or four a lane of a vector."""
    return "AMX" if host().amx else "VNNI" if host().dot == "vnni" else None


def bf16_gflops(threads: int = 1, clock: Clock = time.perf_counter) -> float | None:
    """Likewise with dot products of two bfloat16 numbers a lane; None where the CPU has no instruction for them."""
    return _chains_gops(_bf16_loop(), 2, threads, clock) if host().bf16 else None


def _chains_gops(kernel: Kernel, products: int, threads: int, clock: Clock) -> float:
    """What a loop of CHAINS sums reaches, which adds so many products to each lane in a round."""
    return _peak_gops(kernel, products * CHAINS * host().lanes * ROUNDS, threads, clock)


def _peak_gops(kernel: Kernel, products: int, threads: int, clock: Clock) -> float:
    """What a loop reaches, which computes and adds so many products in a call."""
    numbers = torch.zeros(threads, max(CHAINS * host().lanes, (TILES + 2) * TILE_LANES))
    rows = [row.data_ptr() for row in numbers]
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            list(pool.map(kernel, rows))

        return 2 * products * threads / _fastest_s(run, clock) / 1e9


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
    """CHAINS sums over ROUNDS rounds, of products of floats."""

    def fused(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return b.call(fma(b.module, host().lanes), [total, x, y])

    return _chains(vector(host().lanes), fused)


@once_a_process
def _int8_loop() -> Kernel:
    """The same of four bytes a lane, by the instruction of the kernels."""

    def products(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return dot(b, total, x, y, host())

    return _chains(ir.VectorType(I32, host().lanes), products)


@once_a_process
def _amx_loop() -> Kernel:
    """tiles(numbers): TILES sums over TILE_ROUNDS rounds, of products of the first two tiles; stored behind these."""
    target, module = host(), ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS]), "tiles")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    places = [at(b, function.args[0], const(number * TILE_LANES)) for number in range(2 + TILES)]
    given = (TILES, TILES + 1)  # registers of what is multiplied; sums have those below
    dot_amx.configured(b, dot_amx.CELLS)
    for register, place in zip(given, places[:2], strict=True):
        dot_amx.move(b, "tileloadd64", register, place)
    for register in range(TILES):
        dot_amx.call(b, "tilezero", dot_amx.tile_number(register))
    with loop(b, const(0), const(TILE_ROUNDS)):
        for register in range(TILES):
            dot_amx.call(b, "tdpbsud", *map(dot_amx.tile_number, (register, *given)))
    for register, place in enumerate(places[2:]):
        dot_amx.move(b, "tilestored64", register, place)
    dot_amx.released(b)
    b.ret_void()
    return compile_function(module, "tiles", target, 1)


@once_a_process
def _bf16_loop() -> Kernel:
    """The same of two bfloat16 numbers a lane. As assembly: llvmlite's IR has no such type."""
    binding.initialize_native_asmparser()
    sums, pairs = vector(host().lanes), ir.VectorType(I32, host().lanes)

    def products(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        read = [b.bitcast(each, pairs) for each in (x, y)]
        kind = ir.FunctionType(sums, [sums, pairs, pairs])
        return b.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, *read], False)

    return _chains(sums, products)


def _chains(kind: ir.Type, step: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]) -> Kernel:
    """chains(numbers): CHAINS vectors, to each of which ROUNDS steps by the first two are done."""
    target, module = host(), ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS]), "chains")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    places = _places(b, function.args[0], target.lanes)
    start = [b.bitcast(load_vector(b, place, target.lanes), kind) for place in places]

    def one_each(_: ir.Value, totals: Sequence[ir.Value]) -> list[ir.Value]:
        return [step(b, total, start[0], start[1]) for total in totals]

    for place, total in zip(places, _repeat(b, const(ROUNDS), start, one_each), strict=True):
        store_vector(b, b.bitcast(total, vector(target.lanes)), place, target.lanes)
    b.ret_void()
    return compile_function(module, "chains", target, 1)


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
