"""A program: a graph and its packed weights, run natively. Needs neither the model's class nor its code."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.model.copies import has_memory
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.extents import check_shapes
from autoprune.repack.graph.ir import Graph, build_outputs
from autoprune.repack.graph.ops import TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.kernels.compiler import Target, host, unavailable
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.layout import FLOAT_BYTES
from autoprune.repack.lowering.lower import lower
from autoprune.repack.lowering.per_sample import can_split, split
from autoprune.repack.lowering.steps import ARENA, Lowered, NativeStep, TorchStep, View, settled
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.runtime.by_torch import TorchPlan
from autoprune.repack.runtime.recent import Recent
from autoprune.repack.runtime.thread_pool import Ticket, team

Shapes = tuple[tuple[int, ...], ...]
EVEN = 4  # samples a thread from which on it matters little that some threads have one more
# Inputs of ever new shapes must not fill the memory: bytes of the plans that are remembered, and of what lies ready for
# their next calls.
ROOM, ARENAS = 2**27, 2**29
STEP = 2**13  # bytes that a step of a plan takes besides its arrays, about


@dataclass(eq=False)
class Frame:
    """The memory of one call at a time."""

    slots: NDArray[np.int64]
    holders: list[Tensor]
    counters: list[NDArray[np.int64]]
    address: int  # of the slots
    helpers: list[Ticket] = field(default_factory=list)

    @property
    def free(self) -> bool:
        """Whether nobody looks at its counters any more."""
        return not self.helpers or all(ticket.over for ticket in self.helpers)

    def let_go(self) -> None:
        """Once a call is over: its helpers need not keep alive what they worked on."""
        for ticket in self.helpers:
            ticket.forget()


class Plan:
    """A program made ready for one set of input shapes."""

    def __init__(
        self, graph: Graph, lowered: Lowered, weights: Mapping[str, Weights], tilings: Mapping[str, Tiling],
        threads: int | None,
    ) -> None:  # fmt: skip
        self.graph, self.lowered, self._threads, self._most = graph, lowered, threads, lowered.threads
        # The weights of packed layers are shapes alone: torch must not meet them.
        self._constants = {name: value for name, value in graph.constants.items() if not value.is_meta}
        self._calls = {step: self._call_of(step) for step in lowered.steps if isinstance(step, TorchStep)}
        self.parts: list[NativeSequence | TorchStep] = []
        ops: list[NativeOp] = []
        for step in lowered.steps:
            if isinstance(step, NativeStep):
                ops.append(step.build(weights.get(step.name), tilings.get(step.name, Tiling())))
                continue
            self.parts += [NativeSequence(ops), step] if ops else [step]
            ops = []
        if ops:
            self.parts.append(NativeSequence(ops))
        self._free: list[Frame] = []
        self._lock = threading.Lock()
        # What every call needs, looked up once: a small model's call takes no longer than its work.
        self._fresh = (*lowered.inputs, *lowered.outputs)
        self._whole = {name for name in lowered.returned if lowered.is_whole(name)}
        self._empty = torch.empty(0, dtype=torch.float32, device="cpu")

    def _call_of(self, step: TorchStep) -> Callable[[dict[str, Any]], Any]:
        """The tensors it reads -> its result, everything else looked up now."""
        op, fixed = step.op, {**self._constants, **self.lowered.scalars}
        if isinstance(op, TorchOp):
            known = {name: value for name, value in fixed.items() if name not in step.reads}
            return op.bound(known)
        return lambda given: evaluate_op(op, {**self.lowered.scalars, **given}, self._constants)

    @property
    def threads(self) -> int:
        return min(self._threads or torch.get_num_threads(), self._most)

    def frame(self) -> Frame:
        """Memory that no other call uses."""
        with self._lock:
            for index, frame in enumerate(self._free):
                if frame.free:
                    return self._free.pop(index)
        slots = np.zeros(self.lowered.slots, np.int64)
        holders = [torch.empty(0, device="cpu")] * self.lowered.slots
        holders[ARENA] = self.lowered.arena.allocate()
        for slot, constant in self.lowered.constants.items():
            holders[slot] = constant
        for slot, holder in enumerate(holders):
            slots[slot] = holder.data_ptr() if holder.numel() else 0
        counters = [part.new_counters(self._most) for part in self.parts if isinstance(part, NativeSequence)]
        return Frame(slots, holders, counters, slots.ctypes.data)

    def release(self, frame: Frame) -> None:
        """Gives a call's memory back."""
        frame.let_go()
        with self._lock:
            self._free.append(frame)

    def forget(self) -> None:
        """Frees what lies ready for the next calls."""
        with self._lock:
            self._free.clear()

    @property
    def memory(self) -> int:
        """Bytes that lie ready for the next call."""
        return self.lowered.arena.size * FLOAT_BYTES

    @property
    def size(self) -> int:
        """Bytes that it takes, about, besides the weights, which all plans share, and a call's memory."""
        arrays = [
            array.nbytes
            for part in self.parts if isinstance(part, NativeSequence)
            for op in part.ops for array in (op.fields, *op.arrays.values())
            if array.dtype != np.float32
        ]  # fmt: skip
        own = {slot: x.nbytes for slot, x in self.lowered.constants.items() if not self._shares(x)}
        return STEP * len(self.lowered.steps) + sum(arrays) + sum(own.values())

    def _shares(self, x: Tensor) -> bool:
        return any(x is each for each in self.graph.constants.values())

    def fill(self, frame: Frame, inputs: tuple[Tensor, ...]) -> None:
        """Points the frame to a call's inputs, and to fresh tensors for its outputs."""
        holders, slots = frame.holders, frame.slots
        for slot, x in zip(self.lowered.inputs, inputs, strict=True):
            holders[slot] = x = x.resolve_neg().contiguous()  # a flag may say that it is negated
            slots[slot] = x.data_ptr()
        self.check_numbers(frame)
        for slot, shape in self.lowered.outputs.items():
            holders[slot] = y = self._empty.new_empty(shape)
            slots[slot] = y.data_ptr()

    def check_numbers(self, frame: Frame) -> None:
        """Raises AutopruneError where an input that a frame points to holds a number that a table has no row for."""
        for slot, rows in self.lowered.limits.items():
            _check_numbers(frame.holders[slot], rows)

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """One call's outputs."""
        frame = self.frame()
        result = self.run_in(frame, inputs)
        self.release(frame)
        return result

    def run_in(self, frame: Frame, inputs: tuple[Tensor, ...]) -> Any:
        """One call's outputs; what lies in the frame's arena stays there."""
        self.fill(frame, inputs)
        self.run_parts(frame)
        result = self.results(frame)
        for slot in self._fresh:
            frame.holders[slot] = self._empty  # what the caller holds may be freed
        return result

    def results(self, frame: Frame, shared: bool = False) -> Any:
        """The model's outputs, from a frame; copied where their memory is not theirs alone, unless `shared`."""
        return build_outputs(self.graph.outputs, self.returned(frame.holders, shared))

    def run_parts(self, frame: Frame) -> None:
        """Computes all there is to compute for the tensors that a frame points to."""
        frame.helpers.clear()
        sequence = 0
        for part in self.parts:
            if isinstance(part, NativeSequence):
                self.run_native(part, frame, sequence)
                sequence += 1
            else:
                self.run_torch(part, frame)
        if self.lowered.wrong is not None:
            self.check_rows(frame, self.lowered.wrong)

    def check_rows(self, frame: Frame, place: int) -> None:
        """Raises AutopruneError where a row was to be taken that there is none of."""
        wrong = ctypes.c_int64.from_address(int(frame.slots[ARENA]) + place)
        if wrong.value:
            wrong.value = 0
            raise AutopruneError("a number that the model computed to take an entry by is no entry's.")

    def run_native(self, part: NativeSequence, frame: Frame, sequence: int) -> None:
        slots, threads = frame.address, self.threads
        if threads == 1:
            part.run(slots)
            return
        counters = frame.counters[sequence]
        counters[:] = 0
        place = counters.ctypes.data
        frame.helpers += team(threads).join_in(part.job(slots, place, threads), (part, frame))
        part.run(slots, place, 0, threads)

    def run_torch(self, step: TorchStep, frame: Frame) -> None:
        given = {name: _tensor(frame.holders, view) for name, view in step.reads.items()}
        try:
            result = self._calls[step](given)
        except FAILURES as error:
            raise AutopruneError(f"the operation {step.op.output!r} does not take these values: {error}") from error
        if tuple(result.shape) != step.shape or result.dtype != step.dtype or not result.is_cpu:
            raise AutopruneError(
                f"{step.op.output!r} is {result.dtype} {tuple(result.shape)} on {result.device}, "
                f"not {step.dtype} {step.shape} on the CPU as planned."
            )
        if tuple(result.stride()) != step.stride:
            result = torch.empty_strided(step.shape, step.stride, dtype=result.dtype).copy_(result)
        result = settled(result)
        frame.holders[step.slot] = result
        frame.slots[step.slot] = result.data_ptr()

    def returned(self, holders: list[Tensor], shared: bool = False) -> dict[str, Any]:
        """The model's results; unless `shared`, none lies in memory that another does or the next call writes to."""
        results: dict[str, Any] = dict(self.lowered.scalars)
        for name, view in self.lowered.returned.items():
            if name in self._whole:
                results[name] = holders[view.buffer.slot]
                continue
            tensor = _tensor(holders, view)
            results[name] = tensor.clone() if name in self.lowered.copied and not shared else tensor
        return results


def shapes_of(inputs: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(x.shape) for x in inputs)


def _tensor(holders: list[Tensor], view: View) -> Tensor:
    holder = holders[view.buffer.slot]
    if holder.dtype != view.dtype:  # the arena holds values of all types
        holder = holder.view(view.dtype)
    if view.start == 0 and holder.shape == view.shape and holder.stride() == view.stride:
        return holder
    return holder.as_strided(view.shape, view.stride, holder.storage_offset() + view.start)


def _check_numbers(numbers: Tensor, rows: int) -> None:
    """Native code takes these numbers as they are."""
    if numbers.numel():
        least, most = (int(each) for each in torch.aminmax(numbers))
        if least < 0 or most >= rows:
            given = least if least < 0 else most
            raise AutopruneError(f"an input holds {given}, but the table it is looked up in has rows 0 to {rows - 1}.")


def check_threads(threads: object) -> None:
    """Raises AutopruneError unless `threads` is a positive integer or None."""
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise AutopruneError(f"threads must be a positive integer or None, not {threads!r}.")


class Program:
    """Runs a graph with packed weights; several threads may call it at once.

    Args:
        graph: simplified; its packed weights need only have their shapes.
        weights: of every packed convolution and Linear, by the name of its output.
        tilings: how each is cut into items; the default where none is given.
        threads: of one inference; as many as torch uses at the call when None.
        target: what to compile for; this machine when None.
        by_sample: whether a batch is computed sample by sample where it can be; the graph keeps samples `apart`.
    """

    def __init__(
        self, graph: Graph, weights: Mapping[str, Weights], tilings: Mapping[str, Tiling] | None = None,
        threads: int | None = None, target: Target | None = None, by_sample: bool = False,
    ) -> None:  # fmt: skip
        self.graph, self.weights, self.tilings = graph, dict(weights), dict(tilings or {})
        self.threads, self.target, self.by_sample = threads, target or host(), by_sample
        self._plans: Recent[Shapes, Plan] = Recent(ROOM)
        self._split: Recent[tuple[Shapes, int], tuple[Plan | None]] = Recent(ROOM)
        self._chosen: Recent[tuple[Shapes, int], Plan | TorchPlan] = Recent(ARENAS, lambda plan: plan.forget())
        self._by_torch = TorchPlan(graph, self.weights) if unavailable() else None
        self._dtypes = [getattr(torch, each.dtype) for each in graph.inputs]
        self._lock = threading.Lock()

    def plan(self, shapes: Shapes) -> Plan:
        """The program made ready for inputs of `shapes`, a whole batch at a time.

        Raises:
            AutopruneError: the model does not take them.
        """
        if ready := self._plans.get(shapes):
            return ready
        with self._lock:
            plan = self._plans.get(shapes)
            if plan is None:
                most = max(self.threads or 1, torch.get_num_threads(), os.cpu_count() or 1)
                lowered = lower(self.graph, self.weights, shapes, self.target, most)
                plan = Plan(self.graph, lowered, self.weights, self.tilings, self.threads)
                self._plans.add(shapes, plan, plan.size)
            return plan

    def whole_plan(self, shapes: Shapes) -> Plan | TorchPlan:
        """What a whole batch runs: `plan`, or torch's own functions where no kernel can be compiled."""
        return self._by_torch or self.plan(shapes)

    def chosen_plan(self, shapes: Shapes) -> Plan | TorchPlan:
        """What a call with inputs of `shapes` runs: `plan`, or the program that takes a batch apart."""
        key = shapes, self._threads_now
        ready = self._chosen.get(key)
        if ready is None:
            ready = self._by_torch or self._split_plan(key) or self.plan(shapes)
            self._chosen.add(key, ready, ready.memory)
        return ready

    def _split_plan(self, key: tuple[Shapes, int]) -> Plan | None:
        """`split_plan`, remembered."""
        found = self._split.get(key)
        if found is None:
            found = (self.split_plan(key[0]),)
            self._split.add(key, found, 0 if found[0] is None else found[0].size)
        return found[0]

    def takes_apart(self, shapes: Shapes, threads: int) -> bool:
        """Whether a batch is computed sample by sample by so many threads, if it can be."""
        batch = shapes[0][0] if self.by_sample and shapes and shapes[0] else 0
        return batch >= max(2, threads) and (batch % threads == 0 or batch >= EVEN * threads)

    def split_plan(self, shapes: Shapes) -> Plan | None:
        """The program that computes a batch sample by sample; None where that is not wanted, or cannot be."""
        threads = self._threads_now
        if not self.takes_apart(shapes, threads):
            return None
        single = tuple((1, *shape[1:]) for shape in shapes)
        one = Plan(self.graph, lower(self.graph, self.weights, single, self.target, 1), self.weights, self.tilings, 1)
        (sequence,) = one.parts if can_split(one.lowered) else (None,)
        if not isinstance(sequence, NativeSequence):
            return None
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(single, self._dtypes, strict=True)]
        lowered = split(one.lowered, sequence, sizes, shapes[0][0], threads)
        return Plan(self.graph, lowered, {}, {}, threads)

    @property
    def _threads_now(self) -> int:
        return self.threads or torch.get_num_threads()

    def __deepcopy__(self, memo: object) -> Program:
        """A program of its own memory; the weights, which nothing changes, are shared."""
        return Program(self.graph, self.weights, self.tilings, self.threads, self.target, self.by_sample)

    def __reduce__(self) -> str:
        raise AutopruneError("a program is made for this machine and is no pickle: write it with autoprune.save.")

    def __call__(self, *inputs: Tensor) -> Any:
        return self.plan_for(inputs).run(inputs)

    def plan_for(self, inputs: tuple[Tensor, ...]) -> Plan | TorchPlan:
        """What a call with these inputs runs.

        Raises:
            AutopruneError: the program does not take them.
        """
        for x in inputs:
            if not has_memory(x):
                given = f"one of layout {x.layout}" if type(x) is Tensor else type(x).__name__
                raise AutopruneError(f"a program takes dense tensors, not {given}.")
        shapes = tuple([x.shape for x in inputs])
        plan = self._chosen.get((shapes, self._threads_now))
        if plan is None:
            check_shapes(self.graph.inputs, self.graph.conditions, shapes_of(inputs))
        for x, dtype in zip(inputs, self._dtypes, strict=True):  # native code takes what it gets for these
            if x.dtype != dtype or not x.is_cpu:
                raise AutopruneError(f"a program takes {dtype} on the CPU; the input is {x.dtype} on {x.device}.")
            if x.requires_grad and torch.is_grad_enabled():
                raise AutopruneError(
                    "a repacked model is for inference: call it under torch.inference_mode() or no_grad()."
                )
        return plan or self.chosen_plan(shapes_of(inputs))
