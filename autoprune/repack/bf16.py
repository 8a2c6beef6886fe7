"""Which layers of a captured model multiply bfloat16 numbers: those that have kernels for them, and gain by them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Conv2d, LayerOp, Linear, Op
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.quantize import LayerPrecision
from autoprune.repack.quantize.fit import decibels
from autoprune.repack.runtime.program import Program
from autoprune.repack.tuning.both_precisions import gains
from autoprune.repack.tuning.layer import Layer
from autoprune.repack.tuning.tuning import Tuned, TuningCache
from autoprune.repack.weights.pairs import to_bf16

WORTH = 1.03  # times as fast a layer must be at least: less is noise, and float32 is more accurate

Build = Callable[[Graph, dict[str, Layer]], tuple[Program, Tuned]]
"""(graph, layers that are packed): the program, packed and tuned."""


def faster_layers(
    graph: Graph, packable: Callable[[Graph], dict[str, Layer]], build: Build, inputs: tuple[Tensor, ...],
    cache: TuningCache,
) -> tuple[LayerPrecision, ...]:  # fmt: skip
    """What each layer should be, in the order they run: bf16 where that is faster on this machine.

    Args:
        graph: simplified, in float32.
        packable: the layers of a graph that are packed.
        build: makes a program of a graph.
        inputs: example inputs; what is faster holds for their shapes.
        cache: what is known already.
    """
    packed = packable(graph)
    able = [op.output for op in graph.ops if isinstance(op, LayerOp) and not refusal(op, packed)]
    faster: Mapping[str, float] = {}
    if able:
        halves = with_bf16(graph, able)
        (floats, first), (rounded, second) = build(graph, packed), build(halves, packable(halves))
        faster = gains((floats, rounded), (first, second), able, inputs, cache)
    chosen = [name for name in able if faster.get(name, 0.0) >= WORTH]
    snr_db = _noise(graph, with_bf16(graph, chosen), inputs)
    rows = []
    for op in (op for op in graph.ops if isinstance(op, LayerOp)):
        precision = "bf16" if op.output in chosen else "float32"
        why = refusal(op, packed) or _told(faster.get(op.output))
        rows.append(LayerPrecision(op.layer_or_output, op.output, precision, snr_db=snr_db.get(op.output), why=why))
    return tuple(rows)


def refusal(op: LayerOp, packed: Collection[str]) -> str:
    """Why a layer has no kernel for bfloat16 numbers; empty where it has."""
    if not isinstance(op, (Conv2d, Linear)):
        return f"float32: a {op.label} has no kernel for bf16"
    return "" if op.output in packed else "float32: only packed layers have kernels for bf16"


def _told(gain: float | None) -> str:
    if gain is None:
        return "float32: there was nothing to time"
    if gain >= WORTH:
        return f"{gain:.2f} times as fast as in float32"
    return f"float32: bf16 takes {1 / gain:.2f} of its time, and would have to take {1 / WORTH:.2f}"


def with_bf16(graph: Graph, layers: Collection[str]) -> Graph:
    """The graph in which the layers with these outputs multiply bfloat16 numbers; their weights are rounded.

    It computes in floats what the kernels compute, up to the order of sums.
    """
    constants, ops = dict(graph.constants), list[Op]()
    for op in graph.ops:
        if op.output in layers and isinstance(op, (Conv2d, Linear)):
            held = op.tensors["weight"]
            own = f"{held} in bf16"
            if own not in constants:
                constants[own] = to_bf16(constants[held]).float()
            op = replace(op, bf16=True, tensors={**op.tensors, "weight": own})
        ops.append(op)
    made = replace(graph, ops=tuple(ops), constants=constants)
    read = {name for op in ops for name in (*op.reads, *op.tensors.values())} | set(made.output_names())
    return replace(made, constants={name: tensor for name, tensor in constants.items() if name in read})


@torch.inference_mode()
def _noise(graph: Graph, rounded: Graph, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Layer in bfloat16 numbers -> signal-to-noise ratio of its output, with it alone in them, decibels."""
    values: dict[str, Any] = {each.name: x for each, x in zip(graph.inputs, inputs, strict=True)}
    found = {}
    for op, other in zip(graph.ops, rounded.ops, strict=True):
        values[op.output] = whole = evaluate_op(op, values, graph.constants)
        if isinstance(other, LayerOp) and other.in_bf16:
            error = evaluate_op(other, values, rounded.constants).double() - whole.double()
            found[op.output] = decibels(float(whole.double().square().sum()), float(error.square().sum()))
    return found
