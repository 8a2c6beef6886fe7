"""A batch computed sample by sample: an item of the program is a whole sample, on its thread's own memory.

A sample's values stay in a thread's cache from layer to layer, where those of a batch would fill it many times over,
and threads wait for each other once a call, not once a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import llvmlite.ir as ir
import numpy as np

from autoprune.repack.kernels.compiler import kernel
from autoprune.repack.kernels.fields import INT64_ARRAY, NUMBER, Fields, Given
from autoprune.repack.kernels.ir import LONGS, at, const, loop, op_function, pointer_field
from autoprune.repack.lowering.buffers import Arena, Buffer
from autoprune.repack.lowering.layout import ALIGN, FLOAT_BYTES, LONG_FLOATS, aligned
from autoprune.repack.lowering.steps import ARENA, Lowered, NativeStep, View, contiguous_strides
from autoprune.repack.native.op import NativeOp, op_of
from autoprune.repack.native.sequence import RUN, NativeSequence, give_way, runner_address

NAME = "samples"


class Field(Fields):
    """Entries of the int64 array that describes the op."""

    TABLE = NUMBER  # address of the table of a sample's ops
    OPS = NUMBER
    SLOTS = NUMBER  # how many a sample's ops have
    PER_ITEM = INT64_ARRAY  # per slot: bytes from a sample's to the next one's
    PER_THREAD = INT64_ARRAY  # likewise from a thread's to the next one's
    OWN = NUMBER  # bytes from a thread's arena to where its slots lie


def can_split(one: Lowered) -> bool:
    """Whether a program for one sample is native throughout, and its results are whole tensors of their own."""
    if not all(isinstance(step, NativeStep) for step in one.steps) or not one.steps or one.wrong is not None:
        return False
    return all(one.is_whole(name) and math.prod(view.shape) > 0 for name, view in one.returned.items())


def split(one: Lowered, sequence: NativeSequence, sample: Sequence[int], batch: int, threads: int) -> Lowered:
    """The program for `batch` samples.

    Args:
        one: for one sample; `can_split`.
        sequence: its ops.
        sample: bytes of a sample of each input.
        batch: samples.
        threads: the most that may work on a call; each has an arena of its own.
    """
    own = aligned(one.arena.size)
    arena = own + aligned(LONG_FLOATS * one.slots)
    borders = [
        (start + thread * arena, size, value) for thread in range(threads) for start, size, value in one.arena.borders
    ]
    per_item, per_thread = np.zeros(one.slots, np.int64), np.zeros(one.slots, np.int64)
    for slot, size in zip(one.inputs, sample, strict=True):
        per_item[slot] = size
    for slot, shape in one.outputs.items():
        per_item[slot] = math.prod(shape) * FLOAT_BYTES
    per_thread[ARENA] = arena * FLOAT_BYTES
    outputs = {slot: (batch * shape[0], *shape[1:]) for slot, shape in one.outputs.items()}
    whole = Buffer(threads * arena, slot=ARENA)

    def build(*_: Any) -> NativeOp:
        given: dict[Field, Given] = {
            Field.TABLE: sequence.address, Field.OPS: len(sequence.ops), Field.SLOTS: one.slots,
            Field.PER_ITEM: per_item, Field.PER_THREAD: per_thread, Field.OWN: own * FLOAT_BYTES,
        }  # fmt: skip
        op = op_of(NAME, _kernel(), Field, given, batch)
        return replace(op, keep=(sequence, *op.keep))

    returned = {
        name: View(view.buffer, 0, outputs[view.buffer.slot], contiguous_strides(outputs[view.buffer.slot]))
        for name, view in one.returned.items()
    }
    return replace(
        one, steps=(NativeStep(NAME, [], whole, build),), arena=Arena(max(ALIGN, threads * arena), tuple(borders)),
        outputs=outputs, threads=threads, returned=returned,
    )  # fmt: skip


@kernel
def _kernel() -> ir.Module:
    """The op: an item is a sample."""
    module = ir.Module()
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    per_item, per_thread = (pointer_field(b, get[field], LONGS) for field in (Field.PER_ITEM, Field.PER_THREAD))

    def moved(slot: ir.Value) -> ir.Value:
        by_item, by_thread = (
            b.mul(b.load(at(b, steps, slot)), number) for steps, number in ((per_item, item), (per_thread, thread))
        )
        return b.add(b.load(at(b, slots, slot)), b.add(by_item, by_thread))

    own = pointer_field(b, b.add(moved(const(ARENA)), get[Field.OWN]), LONGS)
    with loop(b, const(0), get[Field.SLOTS]) as slot:
        b.store(moved(slot), at(b, own, slot))
    run = b.inttoptr(const(runner_address()), RUN.as_pointer())
    table, nowhere = pointer_field(b, get[Field.TABLE], LONGS), ir.Constant(LONGS, None)
    b.call(run, [table, const(0), get[Field.OPS], own, nowhere, const(0), const(1), const(give_way())])
    b.ret_void()
    return module
