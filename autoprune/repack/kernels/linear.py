"""Group-wise sparse Linear: vectorised over the filters of a group, which share their inputs.

A few tokens at a time share each vector of weights; a single token keeps several partial sums, so that the latency of
the fused multiply-add is hidden in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_function, once_a_process
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    LONGS,
    at,
    const,
    fma,
    load_vector,
    long_at,
    loop,
    relu_if,
    splat,
    vector,
)


class Field(IntEnum):
    """Entries of the int64 array that describes one call."""

    TOKENS = 0
    IN_FEATURES = 1
    OUT_FEATURES = 2
    GROUPS = 3
    RELU = 4
    GROUP_POINTER = 5  # addresses from here on
    INDEX = 6
    VALUES = 7
    BIAS = 8
    OUT_INDEX = 9


@once_a_process
def linear_kernel(rows: int, target: Target) -> Callable[..., None]:
    """kernel(fields, x, y) for groups of `rows` filters; compiled once a process."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONGS, FLOATS, FLOATS]), "linear")
    fields, x, y = function.args
    x.add_attribute("noalias")
    y.add_attribute("noalias")
    registers = -(-rows // target.lanes)
    together = max(1, 8 // registers)  # sums in flight: tokens, or parts of one token's sum
    b = ir.IRBuilder(function.append_basic_block("entry"))
    get = {field: b.load(at(b, fields, const(field))) for field in Field}
    pointers = {
        field: b.inttoptr(get[field], INTS if field in (Field.GROUP_POINTER, Field.INDEX, Field.OUT_INDEX) else FLOATS)
        for field in Field
        if field >= Field.GROUP_POINTER
    }
    whole = b.mul(b.sdiv(get[Field.TOKENS], const(together)), const(together))
    with loop(b, const(0), get[Field.GROUPS]) as group:
        low = long_at(b, pointers[Field.GROUP_POINTER], group)
        kept = b.sub(long_at(b, pointers[Field.GROUP_POINTER], b.add(group, const(1))), low)
        index = at(b, pointers[Field.INDEX], low)
        values = at(b, pointers[Field.VALUES], b.mul(low, const(rows)))
        bias = load_vector(b, at(b, pointers[Field.BIAS], b.mul(group, const(rows))), rows)
        out_index = at(b, pointers[Field.OUT_INDEX], b.mul(group, const(rows)))
        with loop(b, const(0), whole, together) as token:
            sources = [_row(b, x, b.add(token, const(t)), get[Field.IN_FEATURES]) for t in range(together)]
            sums = _sums(b, module, rows, [bias] * together, kept, index, values, sources)
            for t, total in enumerate(sums):
                _store(b, rows, total, _row(b, y, b.add(token, const(t)), get[Field.OUT_FEATURES]), out_index, get)
        with loop(b, whole, get[Field.TOKENS]) as token:
            source = _row(b, x, token, get[Field.IN_FEATURES])
            total = _single(b, module, rows, together, bias, kept, index, values, source)
            _store(b, rows, total, _row(b, y, token, get[Field.OUT_FEATURES]), out_index, get)
    b.ret_void()
    return compile_function(module, "linear", target, 3)


def _row(b: ir.IRBuilder, base: ir.Value, row: ir.Value, width: ir.Value) -> ir.Value:
    return at(b, base, b.mul(row, width))


def _sums(
    b: ir.IRBuilder,
    module: ir.Module,
    rows: int,
    start: list[ir.Value],
    kept: ir.Value,
    index: ir.Value,
    values: ir.Value,
    sources: list[ir.Value],
    first: ir.Value | None = None,
    step: int = 1,
) -> list[ir.Value]:
    """``start[t] + sum_k values[k] * sources[t][index[k]]`` for k = first .. kept.

    With ``step > 1`` the sums are parts of one token's: part p takes k + p, and `kept - first` divides by step.
    """
    fused = fma(module, rows)
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("k_head", "k_body", "k_done"))
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    k.add_incoming(first or const(0), before)
    sums = [b.phi(vector(rows)) for _ in start]
    for each, value in zip(sums, start, strict=True):
        each.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", k, kept), body, done)
    b.position_at_end(body)
    for part, each in enumerate(sums):
        here = b.add(k, const(part)) if step > 1 else k
        weight = load_vector(b, at(b, values, b.mul(here, const(rows))), rows)
        source = sources[part % len(sources)]
        given = splat(b, b.load(at(b, source, long_at(b, index, here))), rows)
        each.add_incoming(b.call(fused, [weight, given, each]), b.block)
    k.add_incoming(b.add(k, const(step)), b.block)
    b.branch(head)
    b.position_at_end(done)
    return list(sums)


def _single(
    b: ir.IRBuilder,
    module: ir.Module,
    rows: int,
    parts: int,
    bias: ir.Value,
    kept: ir.Value,
    index: ir.Value,
    values: ir.Value,
    source: ir.Value,
) -> ir.Value:
    """One token's sum, in `parts` independent chains and a tail."""
    zero = ir.Constant(vector(rows), None) if rows > 1 else ir.Constant(F32, 0.0)
    whole = b.mul(b.sdiv(kept, const(parts)), const(parts))
    chains = _sums(b, module, rows, [bias, *[zero] * (parts - 1)], whole, index, values, [source], step=parts)
    total = chains[0]
    for chain in chains[1:]:
        total = b.fadd(total, chain)
    return _sums(b, module, rows, [total], kept, index, values, [source], first=whole)[0]


def _store(
    b: ir.IRBuilder, rows: int, total: ir.Value, y: ir.Value, out_index: ir.Value, get: dict[Field, ir.Value]
) -> None:
    """Each filter's result to its place; a row of a padded group has none."""
    relu = b.icmp_signed("!=", get[Field.RELU], const(0))
    for row in range(rows):
        filter_ = long_at(b, out_index, const(row))
        with b.if_then(b.icmp_signed(">=", filter_, const(0))):
            value = b.extract_element(total, ir.Constant(I32, row)) if rows > 1 else total
            b.store(relu_if(b, value, relu), at(b, y, filter_))
