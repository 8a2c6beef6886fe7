"""Attention of few queries, a native op, such as a step of decoding: keys and values are read where they lie."""

from __future__ import annotations

import math

import llvmlite.ir as ir

from autoprune.repack.kernels.attention import Field, heads, share, softmax_in_place
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.few_rows import times, times_turned
from autoprune.repack.kernels.ir import (
    F32,
    address,
    at,
    const,
    float_field,
    load_vector,
    loop,
    op_function,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import splat_float
from autoprune.repack.kernels.panels import Lines
from autoprune.repack.kernels.rows import each
from autoprune.repack.kernels.sums import PARTS

_LINE = 16  # floats in a cache line, the widest vector


def scratch(keys: int, width: int) -> int:
    """Floats of scratch a thread needs: a query, and its scores in whole vectors."""
    return sum(-(-floats // _LINE) * _LINE for floats in (width, keys))


@kernel
def attention(target: Target, biased: bool = False) -> ir.Module:
    """The op, with a bias or without; an item is a head of an image.

    A query for which every key has a bias of minus infinity gets zeros.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    base = heads(b, get, slots, item)
    q, k, v, y = (base(name) for name in "QKVY")
    bias = base("BIAS") if biased else None
    width, keys, value_width = get[Field.WIDTH], get[Field.KEYS], get[Field.VALUE_WIDTH]
    query = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    query = at(b, query, b.mul(thread, get[Field.SCRATCH]))
    line = b.mul(b.sdiv(b.add(width, const(_LINE - 1)), const(_LINE)), const(_LINE))
    scores = at(b, query, line)
    padded = b.mul(b.sdiv(b.add(keys, const(PARTS - 1)), const(PARTS)), const(PARTS))
    factor = float_field(b, get[Field.SCALE])
    factor = factor if biased else b.fmul(factor, splat_float(1 / math.log(2), 1))  # scores as powers of 2

    def scale(given: ir.Value, by: ir.Value, into: ir.Value, count: ir.Value) -> None:
        def write(position: ir.Value, wide: int) -> None:
            value = b.fmul(load_vector(b, at(b, given, position), wide), splat(b, by, wide))
            store_vector(b, value, at(b, into, position), wide)

        each(b, count, lanes, write)

    with loop(b, const(0), get[Field.QUERIES]) as number:
        scale(at(b, q, b.mul(number, get[Field.Q_TOKEN])), factor, query, width)
        times_turned(b, module, query, Lines(k, get[Field.K_TOKEN], keys, width), scores, target)
        with loop(b, keys, padded) as key:
            b.store(ir.Constant(F32, float("-inf")), at(b, scores, key))
        added = None if bias is None else at(b, bias, b.mul(number, get[Field.BIAS_TOKEN]))
        total = softmax_in_place(b, module, scores, keys, added)
        out = at(b, y, b.mul(number, get[Field.Y_TOKEN]))
        times(b, module, scores, Lines(v, get[Field.V_TOKEN], keys, value_width), out, lanes)
        scale(out, share(b, total, biased), out, value_width)
    b.ret_void()
    return module
