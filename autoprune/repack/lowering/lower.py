"""Lowers a graph: every op by the rule of its class, in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.repack.debug import dump, verifying
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import (
    Activation,
    AdaptiveAvgPool2d,
    Add,
    Attention,
    AvgPool2d,
    Conv2d,
    Experts,
    Gate,
    GatedConv2d,
    GlobalAvgPool,
    LayerNorm,
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
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.lowering import conv_rules, interleaved, map_rules, matrices, pointwise, pool_rules, tokens
from autoprune.repack.lowering.buffers import Buffer, place
from autoprune.repack.lowering.context import Lowering, copied
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import (
    ARENA,
    Lowered,
    NativeStep,
    View,
    is_float,
    settled,
    storage_of,
)
from autoprune.repack.lowering.verify import verify
from autoprune.repack.lowering.weights import Weights


def lower(
    graph: Graph, weights: Mapping[str, Weights], shapes: tuple[tuple[int, ...], ...], target: Target, threads: int,
    tilings: Mapping[str, Tiling] | None = None,
) -> Lowered:  # fmt: skip
    """Lowers `graph` for inputs of `shapes`.

    Args:
        graph: simplified.
        shapes: of its inputs.
        target: what the kernels are compiled for.
        threads: the most that will work on one call.
        weights: of every convolution and Linear that is packed, by the name of its output.
        tilings: of those, where they stand; those left out have the default. None: there is room for all that is tried.

    Raises:
        AutopruneError: a shape the model does not take.
    """
    lowering = Lowering(graph, weights, target, threads, tilings)
    for given, shape in zip(lowering.graph.inputs, shapes, strict=True):
        meta = torch.empty(shape, dtype=getattr(torch, given.dtype), device="meta")
        lowering.values[given.name] = meta
        lowering.buffers[storage_of(meta)] = lowering.in_slot()
        lowering.input_slots[given.name] = lowering.slots - 1
    for name, tensor in lowering.constants.items():
        lowering.values[name] = tensor
    for op in lowering.graph.ops:
        try:
            lower_op(lowering, op)
        except FAILURES as error:
            raise AutopruneError(f"{op} does not take what it is given: {error}") from error
    lowered = _placed(lowering)
    dump("lowered", lowered)
    return verify(lowered) if verifying() else lowered


def _placed(lowering: Lowering) -> Lowered:
    """The program that the steps make, every buffer in its place."""
    outputs: dict[int, tuple[int, ...]] = {}
    tensors = [name for name in lowering.graph.output_names() if isinstance(lowering.values[name], Tensor)]
    returned = {name: output_view(lowering, name, outputs) for name in tensors}
    if lowering.wrong is not None:  # nothing else may ever lie there
        lowering.wrong.used(0)
        lowering.wrong.used(len(lowering.steps))
    for index, step in enumerate(lowering.steps):
        for buffer in step.touched:
            buffer.used(index)
    for view in returned.values():
        view.buffer.used(len(lowering.steps))
    scalars = {name: value for name, value in lowering.values.items() if isinstance(value, int)}
    arena = place(native_buffers(lowering), ARENA)
    copied = _sharing(returned, lowering.fixed)  # now that it is known what lies in the arena
    return Lowered(
        steps=tuple(lowering.steps),
        arena=arena,
        slots=lowering.slots,
        inputs=tuple(lowering.input_slots.values()),
        limits=lowering.limits,
        outputs=outputs,
        constants=lowering.fixed,
        scalars=scalars,
        threads=lowering.threads,
        returned=returned,
        copied=copied,
        wrong=None if lowering.wrong is None else lowering.wrong.offset,
        values={name: value for name, value in lowering.values.items() if isinstance(value, Tensor)},
    )


def native_buffers(lowering: Lowering) -> list[Buffer]:
    """Buffers that lie in the arena, sized now that every layout stands."""
    maps = [*lowering.maps.values(), *lowering.planes.values(), *lowering.interleaved.values()]
    for each in maps:
        ending = [over for over in each.over if over.buffer.last == each.buffer.first]
        for over in ending[:1]:
            each.padded(over.pad, over.reach)  # one layout, so that one place can hold both
            each.buffer.over = (over.buffer,)
    for each in maps:
        if each.buffer.slot < 0:
            each.buffer.layout = each.layout
            each.buffer.size = each.layout.size(each.shape[0])
            if each.layout.image > 2**31 - 1:
                raise AutopruneError(f"a feature map of shape {each.shape} is too large for 32-bit offsets.")
    known = [
        *(each.buffer for each in maps),
        *lowering.buffers.values(),
        *lowering.byte_rows.values(),
        *lowering.scratches,
    ]
    return [buffer for buffer in known if buffer.slot < 0]


def output_view(lowering: Lowering, name: str, outputs: dict[int, tuple[int, ...]]) -> View:
    """Where an output of the model lies; what native ops computed goes straight into a fresh tensor."""
    view, meta = lowering.plain(name), lowering.values[name]
    fits = is_float(meta) and meta.is_contiguous() and 2 * meta.numel() >= view.buffer.size
    if view.buffer.slot < 0 and fits:
        view.buffer.slot = lowering.in_slot().slot
        whole = view.buffer.size == meta.numel()
        outputs[view.buffer.slot] = tuple(meta.shape) if whole else (view.buffer.size,)
    return view


def lower_op(lowering: Lowering, op: Op) -> None:
    if isinstance(op, Scalar):
        lowering.values[op.output] = evaluate_op(op, lowering.values, lowering.constants)
        return
    if isinstance(op, Quantize):
        if not is_float(lowering.values[op.inputs[0]]):
            raise AutopruneError(f"{op} takes float32 values, not {op.inputs[0]!r}.")
        interleaved.declare(lowering, op)
        return
    if isinstance(op, AdaptiveAvgPool2d):
        found = pool_rules.pooling(lowering, op)
        if found is None:
            return
        op = found
    rule, before = None if of_shapes(lowering, op) else RULES[type(op)], len(lowering.steps)
    given = op.inputs[:3] if isinstance(op, Attention) else op.inputs  # its mask may be of booleans
    fitting = isinstance(op, TorchOp) or all(is_float(lowering.values[name]) for name in given)
    if rule is not None and fitting and rule(lowering, op):
        # steps before it bring its inputs into the layouts it reads, one behind a layer its output into rows
        own = next((step for step in lowering.steps[before:] if getattr(step, "layer", None) is op), lowering.steps[-1])
        assert isinstance(own, NativeStep)
        own.op = op
        return
    meta = evaluate_op(op, lowering.values, lowering.constants)
    meta = settled(meta) if isinstance(meta, Tensor) else meta
    lowering.values[op.output] = meta
    if op.picks and op.inputs[0] in lowering.grids:
        interleaved.put_on(lowering, op.output, lowering.grids[op.inputs[0]])
    if not isinstance(meta, Tensor):
        lowering.torch_step(op, meta)
        return
    for name in op.reads:
        source = lowering.values.get(name)
        if isinstance(source, Tensor) and storage_of(source) == storage_of(meta):
            lowering.plain(name)  # a view: nothing to run
            if lowering.fixed_value(name) is not None:
                values = {**lowering.values, **lowering.graph.constants, **lowering.known}
                lowering.known[op.output] = evaluate_op(op, values, {})
            return
    if isinstance(op, TorchOp) and lowering.is_known(op, meta):  # it is kept in rows
        meta = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        lowering.values[op.output] = meta
    if meta.storage_offset():  # of a copy of all that lay around it: it is told from its own first element on
        meta = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta")
        lowering.values[op.output] = meta
    if pointwise.is_copy(op) and copied(lowering, op.inputs[0], meta):
        return
    lowering.torch_step(op, meta)


def of_shapes(lowering: Lowering, op: Op) -> bool:
    """Whether an operation computes of what depends on shapes alone, such as a causal mask: once, and by torch."""
    read = [name for name in op.reads if isinstance(lowering.values[name], Tensor)]
    if not isinstance(op, TorchOp) or any(lowering.fixed_value(name) is None for name in read):
        return False
    meta = evaluate_op(op, lowering.values, lowering.constants)
    return isinstance(meta, Tensor) and lowering.is_known(op, meta)


def _sharing(returned: Mapping[str, View], fixed: Collection[int]) -> frozenset[str]:
    """The results that must be copied: what lies in the arena or is `fixed`, and what another result holds too."""
    copied, held = set(), dict[int, list[tuple[int, int]]]()
    for name, view in returned.items():
        last = view.start + sum((extent - 1) * step for extent, step in zip(view.shape, view.stride, strict=True))
        others = held.setdefault(view.buffer.slot, [])
        if (
            view.buffer.slot == ARENA
            or view.buffer.slot in fixed
            or any(a <= last and view.start <= z for a, z in others)
        ):
            copied.add(name)
        else:
            others.append((view.start, last))
    return frozenset(copied)


RULES: Mapping[type[Op], Callable[[Lowering, Any], bool] | None] = {
    Conv2d: conv_rules.conv2d,
    GatedConv2d: conv_rules.conv2d,
    Gate: conv_rules.gate,
    Scale: None,
    Linear: tokens.linear,
    Recurrent: tokens.recurrent,
    MaxPool2d: pool_rules.pool,
    AvgPool2d: pool_rules.pool,
    AdaptiveAvgPool2d: map_rules.adaptive,  # where its windows differ; else it is one of the others
    GlobalAvgPool: pool_rules.global_avg_pool,
    LayerNorm: tokens.norm,
    RmsNorm: tokens.norm,
    Rotary: matrices.rotary,
    Attention: matrices.attention,
    Experts: None,
    Activation: pointwise.elementwise,
    Add: pointwise.elementwise,
    Quantize: None,
    Reshape: None,
    Scalar: None,  # computed while the graph is lowered
    TorchOp: pointwise.torch_operator,
}
"""Class -> the rule that lowers it to native ops; False, or no rule, when torch has to run it."""
