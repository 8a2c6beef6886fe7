"""How long each operation of a repacked model takes, where it runs: inside a pass over the whole program."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.timer import Clock, Protocol, torch_threads
from autoprune.model.copies import copy_for_inference
from autoprune.model.inventory import as_tuple, record_inputs
from autoprune.model.weights import layer_at, module_at, weight_of
from autoprune.repack.graph.ops import (
    Activation,
    AdaptiveAvgPool2d,
    Add,
    Attention,
    AvgPool2d,
    Conv2d,
    ConvolutionOp,
    Experts,
    Gate,
    GatedConv2d,
    GlobalAvgPool,
    LayerNorm,
    LayerOp,
    Linear,
    MaxPool2d,
    Op,
    Quantize,
    Recurrent,
    Reshape,
    RmsNorm,
    Rotary,
    Scalar,
    Scale,
    TorchOp,
)
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.layout import FLOAT_BYTES
from autoprune.repack.lowering.steps import Lowered, NativeStep
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.probes import fresh
from autoprune.repack.report import ProgramModel
from autoprune.repack.runtime.program import Plan, Program, shapes_of

NATIVE, TORCH = "jit", "torch"
COPY = "copy"
FORMATS = ("contiguous", "channels_last")

_Timed = Iterator[tuple[Hashable, float]]  # what was timed, seconds


@dataclass(frozen=True)
class LayerTime:
    """One operation of a program, timed on one thread.

    Attributes:
        name: of the module it came from, else of the value it computes.
        kind: e.g. ``conv2d``; ``copy`` brings a value into the layout that the next operation reads.
        backend: ``jit``: native code; ``torch``.
        sparsity: share of zeros in the weight that was packed; None without one.
        group_size: filters that share their kept positions, as packed; None likewise.
        tiling: how it is cut into items; None likewise.
        flops: useful ones: two for every kept weight (or product of attention) at every position; 0 where it does not
            multiply and add.
        bytes: what moves at least once: values read and written, weights and their indices.
        median_us, min_us: microseconds over the rounds; about one of them is the call of native code from Python.
        dense_us: median of torch's own layer on its own input, the faster of two memory formats. It does less: what
            the program fused into the operation is not in it. None where there is no such layer.
        dense_format: ``contiguous`` or ``channels_last``.
    """

    name: str
    kind: str
    backend: str
    sparsity: float | None
    group_size: int | None
    tiling: Tiling | None
    flops: int
    bytes: int
    median_us: float
    min_us: float
    dense_us: float | None = None
    dense_format: str | None = None

    @property
    def gflops(self) -> float:
        """Useful GFLOP/s."""
        return self.flops / self.median_us / 1e3

    @property
    def intensity(self) -> float:
        """Useful FLOP a byte."""
        return self.flops / max(1, self.bytes)


def layer_times(
    fast: ProgramModel,
    model: nn.Module,
    example_inputs: Any,
    protocol: Protocol | None = None,
    clock: Clock = time.perf_counter,
    round_done: Callable[[], None] = lambda: None,
) -> tuple[LayerTime, ...]:
    """Times every operation of a program, in the order they run, and the dense layers they came from.

    A round is a pass over the program and one over the dense layers in each memory format, so that everything finds
    the caches as in a real inference; a dense layer's input is read before it is timed, as if just written.

    Args:
        fast: what `repack` made of `model`; its operations are timed on one thread, whatever it was made for.
        model: left as it is.
        example_inputs: as given to `repack`.
        protocol: its `samples` and `warmup` are the rounds.
        clock: seconds.
        round_done: called after each timed round.

    Raises:
        AutopruneError: `fast` is no program, or does not take these inputs.
    """
    if not isinstance(fast, ProgramModel):
        raise AutopruneError(f"only a program can be timed by its layers, not a {type(fast).__name__}: see its report.")
    protocol, inputs = protocol or Protocol(), as_tuple(example_inputs)
    with torch.inference_mode(), torch_threads(1):
        fast(*fresh(inputs))  # says what is wrong with the inputs
        plan = fast.program.plan(shapes_of(inputs))
        works = _works(fast.program, plan.lowered)
        compared = [work.layer for work in works if work.layer is not None]
        passes: list[Callable[[], _Timed]] = [partial(_program_pass, plan, inputs, clock)]
        passes += _dense_passes(model, inputs, compared, clock)
        taken: dict[Hashable, list[float]] = {}
        for number in range(-max(1, protocol.warmup), protocol.samples):
            for run in passes:
                for key, seconds in run():
                    if number >= 0:
                        taken.setdefault(key, []).append(seconds * 1e6)
            if number >= 0:
                round_done()
    return tuple(_row(index, work, taken) for index, work in enumerate(works))


@dataclass(frozen=True)
class _Work:
    """What an operation does; `layer` names the dense layer it is compared with."""

    about: LayerTime
    layer: str | None


def _row(index: int, work: _Work, taken: Mapping[Hashable, list[float]]) -> LayerTime:
    times = taken[index]
    made = replace(work.about, median_us=statistics.median(times), min_us=min(times))
    dense = {each: statistics.median(taken[work.layer, each]) for each in FORMATS if (work.layer, each) in taken}
    if not dense:
        return made
    best = min(dense, key=dense.__getitem__)
    return replace(made, dense_us=dense[best], dense_format=best)


def _program_pass(plan: Plan, inputs: tuple[Tensor, ...], clock: Clock) -> _Timed:
    """Runs the program an operation at a time: (its index, seconds)."""
    frame = plan.frame()
    plan.fill(frame, inputs)
    slots, index = frame.address, 0
    for part in plan.parts:
        if isinstance(part, NativeSequence):
            calls = [partial(part.run_op, at, slots) for at in range(len(part.ops))]
        else:
            calls = [partial(plan.run_torch, part, frame)]
        for call in calls:
            start = clock()
            call()
            yield index, clock() - start
            index += 1
    plan.release(frame)


def _dense_passes(
    model: nn.Module, inputs: tuple[Tensor, ...], names: Iterable[str], clock: Clock
) -> list[Callable[[], _Timed]]:
    """A pass over the model's own layers for each memory format: ((name, format), seconds)."""
    original = copy_for_inference(model)
    recorded = record_inputs(original, fresh(inputs), list(names))
    contiguous, channels_last = FORMATS
    layers = {(name, contiguous): (_dense_layer(original, name, x), x.contiguous()) for name, x in recorded.items()}
    last: dict[tuple[str, str], tuple[nn.Module, Tensor]] = {}
    other = copy_for_inference(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, x in recorded.items():
        if isinstance(module_at(original, name), nn.Conv2d) and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            last[name, channels_last] = other.get_submodule(name), x
    return [partial(_dense_pass, each, clock) for each in (layers, last)]


def _dense_layer(model: nn.Module, name: str, x: Tensor) -> nn.Module:
    """What multiplies `x` by the weight of a layer in torch."""
    other = module_at(model, name) is None and weight_of(model, name).shape[1] != x.shape[-1]
    return layer_at(model, name, turned=other)


def _dense_pass(layers: Mapping[tuple[str, str], tuple[nn.Module, Tensor]], clock: Clock) -> _Timed:
    for key, (layer, x) in layers.items():
        x.sum()  # into the caches
        start = clock()
        layer(x)
        yield key, clock() - start


def described(program: Program, lowered: Lowered) -> tuple[LayerTime, ...]:
    """A row for each step of a lowered program, in the order they run, whose times are yet to be taken."""
    return tuple(work.about for work in _works(program, lowered))


def _works(program: Program, lowered: Lowered) -> list[_Work]:
    """What each step does, in order."""
    values = lowered.values
    works, seen = [], set()
    for step in lowered.steps:
        op = step.op
        if op is None:
            assert isinstance(step, NativeStep)
            moved = 2 * values[step.name].nbytes
            works.append(_Work(LayerTime(step.name, COPY, NATIVE, None, None, None, 0, moved, 0.0, 0.0), None))
            continue
        backend = NATIVE if isinstance(step, NativeStep) else TORCH
        about = _about(op, backend, program.weights.get(op.output), program.tilings.get(op.output), values)
        # a recurrent weight's own layer does one step, the operation all of them
        layer = op.layer if isinstance(op, LayerOp) and not isinstance(op, Recurrent) else None
        works.append(_Work(about, None if layer in seen else layer))  # a later call may have another input
        seen.add(layer)
    return works


def _about(
    op: Op, backend: str, weights: Weights | None, tiling: Tiling | None, values: Mapping[str, Tensor]
) -> LayerTime:
    name = (op.layer if isinstance(op, LayerOp) else None) or op.output
    kind = op.op.split(".")[1] if isinstance(op, TorchOp) else op.kind
    held = [values[each] for each in {*op.inputs, op.output, *op.tensors.values()} if each in values]
    moved = sum(each.nbytes for each in held)
    if isinstance(op, ConvolutionOp):
        x, y, kernel = values[op.inputs[0]], values[op.output], values[op.tensors["weight"]].shape[2:]
        most = x.shape[0] * x.shape[1] * y.shape[2:].numel() * kernel.numel()
        moved -= max(0, x.nbytes - FLOAT_BYTES * most)  # a stride that leaves positions out
    sparsity = size = None
    if weights is not None:
        packed = weights.packed
        moved += packed.values.nbytes + packed.index.nbytes - values[op.tensors["weight"]].nbytes
        sparsity = 1 - np.count_nonzero(packed.values) / max(1, math.prod(packed.shape))
        size = packed.group_size
    return LayerTime(name, kind, backend, sparsity, size, tiling, _flops(op, weights, values), moved, 0.0, 0.0)


def _flops(op: Op, weights: Weights | None, values: Mapping[str, Tensor]) -> int:
    rule = FLOPS[type(op)]
    return 0 if rule is None else rule(op, weights, values)


def _layer_flops(op: LayerOp, weights: Weights | None, values: Mapping[str, Tensor]) -> int:
    kept = values[op.tensors["weight"]].numel() if weights is None else int(np.count_nonzero(weights.packed.values))
    return 2 * kept * op.positions(values[op.output].shape)


def _expert_flops(op: Experts, weights: Weights | None, values: Mapping[str, Tensor]) -> int:
    return 2 * values[op.output].numel() * values[op.inputs[0]].shape[-1]


def _attention_flops(op: Attention, weights: Weights | None, values: Mapping[str, Tensor]) -> int:
    return 2 * (values[op.inputs[0]].numel() + values[op.output].numel()) * values[op.inputs[1]].shape[-2]


FLOPS: Mapping[type[Op], Callable[[Any, Weights | None, Mapping[str, Tensor]], int] | None] = {
    Conv2d: _layer_flops,
    GatedConv2d: _layer_flops,
    Linear: _layer_flops,
    Recurrent: _layer_flops,
    Attention: _attention_flops,
    Experts: _expert_flops,
    **dict.fromkeys(
        (
            Gate, Scale, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, GlobalAvgPool, Activation, Add, LayerNorm, RmsNorm,
            Rotary, Reshape, Scalar, Quantize, TorchOp,
        )
    ),
}  # fmt: skip
"""Class -> its useful floating point operations; None where it does not multiply and add, or torch alone knows."""
