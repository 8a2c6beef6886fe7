"""A built model as LLVM IR: its kernels, its data, and the functions that C calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import llvmlite.ir as ir
import numpy as np

from autoprune.repack.aot.call import HEAD, Call, Status
from autoprune.repack.aot.image import LINE, Image
from autoprune.repack.aot.interface import Port, Result
from autoprune.repack.kernels.compiler import Kernel, Target, linked_code
from autoprune.repack.kernels.ir import F32, I8, I32, I64, LONGS, at, const, loop
from autoprune.repack.lowering.steps import ARENA
from autoprune.repack.native.sequence import LINE as COUNTER
from autoprune.repack.native.sequence import Work, run_items

BYTES = I8.as_pointer()
IDLE = ir.FunctionType(ir.VoidType(), []).as_pointer()


def compiled_calls(calls: Mapping[Call, int], image: Image, target: Target, ops: bool = False) -> bytes:
    """The object file of kernels, data and entry points, for one target; with `ops` also those of single ops.

    `calls`: each with its `mark`.
    """
    kernels = dict.fromkeys(kernel for call in calls for kernel, *_ in call.ops)
    names = {kernel: f"{kernel.name}_{number}" for number, kernel in enumerate(kernels)}
    own = ir.Module("model")
    data = _data(own, image)
    kind = ir.FunctionType(ir.VoidType(), [LONGS, LONGS, I64, I64])
    declared = {kernel: ir.Function(own, kind, name) for kernel, name in names.items()}
    for call, number in calls.items():
        told = ir.GlobalVariable(own, I64, f"{call.prefix}_mark")  # for wrappers, before they call anything
        told.global_constant, told.initializer = True, const(number)
        _prepare(own, call, number)
        work = _work(own, call, data, declared)
        _entry(own, call, work, number, parts=False)
        if call.threads > 1:
            _entry(own, call, work, number, parts=True)
        if ops:
            _one_op(own, call, data, declared)
    return linked_code(own, {name: kernel for kernel, name in names.items()}, target)


def _data(module: ir.Module, image: Image) -> ir.GlobalVariable:
    kind = ir.ArrayType(I8, image.size)
    data = ir.GlobalVariable(module, kind, "model_data")
    data.linkage, data.global_constant, data.align = "internal", True, LINE
    data.initializer = _Bytes(kind, image.data)
    return data


class _Bytes(ir.Constant):  # type: ignore[misc]
    """A constant array of bytes, written at once: llvmlite goes through them one by one."""

    def __init__(self, kind: ir.Type, data: bytes) -> None:
        super().__init__(kind, None)
        self._data = data

    def __str__(self) -> str:
        return f"{self.type} {self.get_reference()}"

    def get_reference(self) -> str:
        digits = np.frombuffer(self._data.hex().upper().encode(), np.uint8).reshape(-1, 2)
        text = np.concatenate([np.full((len(digits), 1), ord("\\"), np.uint8), digits], axis=1)
        return f'c"{text.tobytes().decode()}"'


def _function(module: ir.Module, name: str, kinds: Sequence[ir.Type]) -> tuple[ir.Function, ir.IRBuilder]:
    function = ir.Function(module, ir.FunctionType(I32, kinds), name)
    return function, ir.IRBuilder(function.append_basic_block("entry"))


def _refuse(b: ir.IRBuilder, wrong: ir.Value, status: Status) -> None:
    with b.if_then(wrong, likely=False):
        b.ret(I32(int(status)))


def _check_memory(b: ir.IRBuilder, pointer: ir.Value, alignment: int) -> None:
    number = b.ptrtoint(pointer, I64)
    _refuse(b, b.icmp_unsigned("==", number, const(0)), Status.NULL_POINTER)
    if alignment > 1:
        _refuse(b, b.icmp_unsigned("!=", b.and_(number, const(alignment - 1)), const(0)), Status.MISALIGNED)


def _prepare(module: ir.Module, call: Call, prepared: int) -> None:
    """``prepare(workspace)``: makes memory a workspace."""
    function, b = _function(module, f"{call.prefix}_prepare", [BYTES])
    (workspace,) = function.args
    _check_memory(b, workspace, LINE)
    longs = b.bitcast(workspace, LONGS)
    with loop(b, const(0), const(call.workspace_bytes // 8)) as number:
        b.store(const(0), at(b, longs, number))
    with loop(b, const(0), const(call.arenas)) as thread:
        arena = b.bitcast(_arena(b, call, workspace, thread), F32.as_pointer())
        for start, size, value in call.lowered.arena.borders:
            with loop(b, const(start), const(start + size)) as number:
                b.store(F32(value), at(b, arena, number))
    b.store(const(prepared), longs)
    b.ret(I32(int(Status.OK)))


def _arena(b: ir.IRBuilder, call: Call, workspace: ir.Value, thread: ir.Value) -> ir.Value:
    """Where a thread's arena begins, or the only one."""
    first = at(b, workspace, const(call.arena_at))
    return first if call.arenas == 1 else at(b, first, b.mul(thread, const(call.arena_bytes)))


def _work(module: ir.Module, call: Call, data: ir.Value, kernels: Mapping[Kernel, ir.Function]) -> ir.Function:
    """``work(inputs, outputs, workspace, part, parts, idle)``: what every part of a call does, once all is checked."""
    count = len(call.inputs) + len(call.outputs)
    function, b = _function(module, f"{call.prefix}_work", [*[BYTES] * (count + 1), I64, I64, IDLE])
    function.linkage = "internal"
    *tensors, workspace, part, parts, idle = function.args
    outputs, image, arena = tensors[len(call.inputs) :], b.bitcast(data, BYTES), _arena(b, call, workspace, part)
    bases = _bases(b, call, data, tensors, workspace, arena)
    slots = _slots(b, call, bases)
    counters = b.bitcast(at(b, workspace, const(HEAD)), LONGS)
    for number, (kernel, place, items) in enumerate(call.ops):
        fields = b.bitcast(at(b, image, const(place)), LONGS)
        work = Work(kernels[kernel], fields, slots, const(items))
        if call.shares_ops:
            own = at(b, counters, b.mul(b.mul(const(number), b.add(parts, const(1))), const(COUNTER)))
            run_items(b, work, own, part, parts, idle)
        else:
            with loop(b, const(0), work.items) as item:
                b.call(work.kernel, [fields, slots, item, const(0)])
    status = b.alloca(I32)
    b.store(I32(int(Status.OK)), status)
    # of a sample, which one thread computes alone, that thread copies the results
    copies = b.icmp_signed("==", part, const(0)) if call.samples == 1 else ir.Constant(ir.IntType(1), 1)
    with b.if_then(copies):
        for number, result in enumerate(call.outputs):
            if call.written_in_place.get(result.view.buffer.slot) != number:  # views of another result among them
                _copy(b, result, bases[result.view.buffer.slot], outputs[number])
        if call.lowered.wrong is not None:
            wrong = b.bitcast(at(b, arena, const(call.lowered.wrong)), LONGS)
            with b.if_then(b.icmp_signed("!=", b.load(wrong), const(0)), likely=False):
                b.store(const(0), wrong)
                b.store(I32(int(Status.OUT_OF_RANGE)), status)
    b.ret(b.load(status))
    return function


def _bases(
    b: ir.IRBuilder, call: Call, data: ir.Value, tensors: Sequence[ir.Value], workspace: ir.Value, arena: ir.Value
) -> dict[int, ir.Value]:
    """Slot -> where the memory begins that it stands for."""
    inputs, outputs = tensors[: len(call.inputs)], tensors[len(call.inputs) :]
    image = b.bitcast(data, BYTES)
    return {
        0: image,  # what fields tell as an address counts from the image on
        ARENA: arena,
        **dict(zip(call.lowered.inputs, inputs, strict=True)),
        **{slot: at(b, image, const(place)) for slot, place in call.constants.items()},
        **{slot: at(b, workspace, const(place)) for slot, place in call.own_results.items()},
        **{slot: outputs[number] for slot, number in call.written_in_place.items()},
    }


def _slots(b: ir.IRBuilder, call: Call, bases: Mapping[int, ir.Value]) -> ir.Value:
    """The table of slots that kernels read."""
    slots = b.alloca(I64, call.lowered.slots)
    for slot in range(call.lowered.slots):
        base = b.ptrtoint(bases[slot], I64) if slot in bases else const(0)
        b.store(base, at(b, slots, const(slot)))
    return slots


def _of_sample(b: ir.IRBuilder, call: Call, tensors: Sequence[ir.Value], sample: ir.Value) -> list[ir.Value]:
    """Where a sample's share of each input and output begins."""
    sizes = [port.bytes // call.samples for port in call.ports]
    return [at(b, x, b.mul(sample, const(size))) for x, size in zip(tensors, sizes, strict=True)]


def _one_op(module: ir.Module, call: Call, data: ir.Value, kernels: Mapping[Kernel, ir.Function]) -> None:
    """``run_op(inputs, outputs, workspace, op)``: one op of a call by itself, for who times them in their order.

    Of a call of several samples the ops of the first come first, then those of the second, and so on.
    """
    count = len(call.inputs) + len(call.outputs)
    function, b = _function(module, f"{call.prefix}_run_op", [*[BYTES] * (count + 1), I32])
    *tensors, workspace, chosen = function.args
    every = I32(max(1, len(call.ops)))
    _refuse(b, b.icmp_unsigned(">=", chosen, I32(len(call.ops) * call.samples)), Status.OUT_OF_RANGE)
    own = _of_sample(b, call, tensors, b.zext(b.udiv(chosen, every), I64))
    bases = _bases(b, call, data, own, workspace, _arena(b, call, workspace, const(0)))
    slots, image = _slots(b, call, bases), b.bitcast(data, BYTES)
    none = b.append_basic_block("none")
    switch = b.switch(b.urem(chosen, every), none)
    for number, (kernel, place, items) in enumerate(call.ops):
        block = b.append_basic_block(f"op_{number}")
        switch.add_case(I32(number), block)
        b.position_at_end(block)
        fields = b.bitcast(at(b, image, const(place)), LONGS)
        with loop(b, const(0), const(items)) as item:
            b.call(kernels[kernel], [fields, slots, item, const(0)])
        b.ret(I32(int(Status.OK)))
    b.position_at_end(none)
    b.ret(I32(int(Status.OUT_OF_RANGE)))


def data_module(arrays: Mapping[str, bytes]) -> str:
    """A module of constants alone, which C knows by these names."""
    module = ir.Module("data")
    for name, held in arrays.items():
        kind = ir.ArrayType(I8, len(held))
        data = ir.GlobalVariable(module, kind, name)
        data.global_constant, data.align = True, LINE
        data.initializer = _Bytes(kind, held)
    return str(module)


def _copy(b: ir.IRBuilder, result: Result, base: ir.Value, into: ir.Value) -> None:
    """A result from where the ops leave it."""
    port, view = result.port, result.view
    kind = ir.IntType(8 * port.entry_bytes).as_pointer()
    source = at(
        b, b.bitcast(at(b, base, const(view.buffer.offset + view.offset * view.dtype.itemsize)), kind), const(0)
    )
    target = b.bitcast(into, kind)

    def axis(number: int, source: ir.Value, target: ir.Value) -> None:
        if number == len(view.shape):
            b.store(b.load(source), target)
            return
        inner = int(np.prod(view.shape[number + 1 :]))
        with loop(b, const(0), const(view.shape[number])) as index:
            axis(
                number + 1,
                at(b, source, b.mul(index, const(view.stride[number]))),
                at(b, target, b.mul(index, const(inner))),
            )

    axis(0, source, target)


def _check_numbers(b: ir.IRBuilder, port: Port, pointer: ir.Value, rows: int) -> None:
    """Refuses an input that holds a number which a table has no row for."""
    kind = ir.IntType(8 * port.entry_bytes)
    numbers = b.bitcast(pointer, kind.as_pointer())
    with loop(b, const(0), const(port.count)) as index:
        _refuse(b, b.icmp_unsigned(">=", b.load(at(b, numbers, index)), kind(rows)), Status.OUT_OF_RANGE)


def _entry(module: ir.Module, call: Call, work: ir.Function, prepared: int, parts: bool) -> None:
    """``run(inputs, outputs, workspace)``, or ``run_part`` with a part's number, how many there are, and what waits."""
    ports = call.ports
    kinds = [*[BYTES] * (len(ports) + 1), *([I32, I32, IDLE] if parts else [])]
    function, b = _function(module, f"{call.prefix}_run{'_part' if parts else ''}", kinds)
    tensors, workspace = function.args[: len(ports)], function.args[len(ports)]
    for port, pointer in zip(ports, tensors, strict=True):
        _check_memory(b, pointer, port.entry_bytes)
    _check_memory(b, workspace, LINE)
    head = b.bitcast(workspace, LONGS)
    _refuse(b, b.icmp_unsigned("!=", b.load(head), const(prepared)), Status.NOT_PREPARED)
    for slot, rows in call.lowered.limits.items():
        number = call.lowered.inputs.index(slot)
        _check_numbers(b, call.inputs[number], tensors[number], rows)
    nothing = _nothing(module)
    if not parts:
        b.ret(_computed(b, call, work, [*tensors, workspace], (const(0), const(1), nothing)))
        return
    part, count, idle = function.args[len(ports) + 1 :]
    _refuse(b, b.icmp_signed("<", part, I32(0)), Status.WRONG_PART)
    _refuse(b, b.icmp_signed(">=", part, count), Status.WRONG_PART)
    _refuse(b, b.icmp_signed(">", count, I32(call.threads)), Status.WRONG_PART)
    idle = b.select(b.icmp_unsigned("==", b.ptrtoint(idle, I64), const(0)), nothing, idle)
    status = _computed(b, call, work, [*tensors, workspace], (b.sext(part, I64), b.sext(count, I64), idle))
    if not call.shares_ops:
        b.ret(status)
        return
    ended = b.add(b.atomic_rmw("add", at(b, head, const(1)), const(1), "acq_rel"), const(1))
    with b.if_then(b.icmp_signed("==", ended, b.sext(count, I64))):  # nobody looks at the counters any more
        counters = b.bitcast(at(b, workspace, const(HEAD)), LONGS)
        with loop(b, const(0), const(call.counters_bytes // 8)) as number:
            b.store(const(0), at(b, counters, number))
        b.store_atomic(const(0), at(b, head, const(1)), "release", 8)
    b.ret(status)


def _computed(
    b: ir.IRBuilder, call: Call, work: ir.Function, memory: Sequence[ir.Value],
    part: tuple[ir.Value, ir.Value, ir.Value],
) -> ir.Value:  # fmt: skip
    """The status of a part's work: of all ops, or of its samples, every so many."""
    if call.samples == 1:
        return b.call(work, [*memory, *part])
    (*tensors, workspace), (number, parts, _) = memory, part
    with loop(b, const(0), b.sdiv(b.add(b.sub(const(call.samples - 1), number), parts), parts)) as turn:
        sample = b.add(number, b.mul(turn, parts))
        b.call(work, [*_of_sample(b, call, tensors, sample), workspace, *part])
    return I32(int(Status.OK))


def _nothing(module: ir.Module) -> ir.Function:
    """A function that does nothing, for parts that wait without giving their processor away."""
    known = module.globals.get("model_idle")
    if isinstance(known, ir.Function):
        return known
    function = ir.Function(module, IDLE.pointee, "model_idle")
    function.linkage = "internal"
    ir.IRBuilder(function.append_basic_block("entry")).ret_void()
    return function
