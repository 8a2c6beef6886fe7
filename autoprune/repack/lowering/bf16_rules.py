"""What layers that multiply bfloat16 numbers read: values rounded to them, once for all such layers.

A rounded value is a value of its own, of floats: a map, or rows, like any other.
"""

from __future__ import annotations

from typing import Any

import torch

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.kernels.compiler import DOT_BF16, Target
from autoprune.repack.lowering import map_nodes, token_nodes
from autoprune.repack.lowering.context import Lowering, Operand, write
from autoprune.repack.lowering.steps import Map, NativeStep, View, storage_of
from autoprune.repack.lowering.strided_nodes import Function
from autoprune.repack.native.op import NativeOp


def lacking(target: Target) -> str | None:
    """Why layers cannot multiply bfloat16 numbers on a target; None where they can."""
    if target.bf16:
        return None
    return (
        f"precision 'bf16' needs the instruction {DOT_BF16}, which {target.cpu} lacks: use precision='float32', or "
        "'int8' with calibration batches."
    )


def in_bf16(lowering: Lowering, op: LayerOp) -> bool:
    """Whether a packed layer multiplies bfloat16 numbers.

    Raises AutopruneError where it does and the target cannot.
    """
    weights = lowering.weights.get(op.output)
    if weights is None or not weights.packed.in_bf16:
        return False
    if reason := lacking(lowering.target):
        raise AutopruneError(reason)
    return True


def name_of(lowering: Lowering, name: str) -> str:
    """The rounded value of a value."""
    return lowering.own_name(f"{name} in bf16")


def rounded_map(lowering: Lowering, name: str, stride: tuple[int, int]) -> str:
    """The rounded value's name, once it has a map, in phase planes for the stride."""
    own = name_of(lowering, name)
    key = (own, stride, 0.0)
    if key not in lowering.maps:
        if own not in lowering.values:  # or it has a place already, as rows
            lowering.define(own, tuple(lowering.values[name].shape))
        batch, channels, height, width = lowering.values[own].shape
        made = lowering.maps[key] = Map((batch, channels, height, width), stride, 0.0)
        lowering.copy_into(name, made, rounds=True)
    return own


def rounded_planes(lowering: Lowering, name: str, tokens: int) -> Map:
    """The rounded value, rows of tokens, as a map with a channel a feature."""
    own = name_of(lowering, name)
    if own not in lowering.planes:
        source = lowering.planes.get(name)
        shape = (1, int(lowering.values[name].shape[-1]), 1, tokens)
        made = lowering.planes[own] = Map(shape, (1, 1), 0.0).padded((0, 0))
        given = lowering.rows(name) if source is None else source

        def build(*_: Any) -> NativeOp:
            if isinstance(given, View):
                return token_nodes.into_planes(own, tokens, given.rows(), made.at, lowering.target, rounds=True)
            return map_nodes.copied(own, shape, given.ref(), made.at.ref(0), made.layout, lowering.target, rounds=True)

        lowering.steps.append(NativeStep(own, [given.buffer], made.buffer, build))
    return lowering.planes[own]


def rounded_rows(lowering: Lowering, name: str) -> View:
    """The rounded value in rows."""
    own = name_of(lowering, name)
    if own not in lowering.values or storage_of(lowering.values[own]) not in lowering.buffers:
        given = lowering.rows(name)
        made = lowering.made(own, given.shape)
        write(lowering, own, given.shape, [Operand(given, given.shape)], made, Function("", "bf16", torch.float32))
    return lowering.plain(own)
