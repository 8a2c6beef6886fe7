"""Where values are moved onto grids of bytes, given the layers that read bytes.

A value is `alone` on its grid where everything that reads it can read bytes, so that its floats need not be stored:
then all its readers read the rounded value. Elsewhere only int8 layers do, as in a transformer, whose residual stream
stays float. Maxima, flattened maps and joined axes of tokens commute with rounding, so the grid moves up through them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoprune.quantization import WEIGHT_LEVELS, Grid
from autoprune.repack.graph.editor import Editor, meta_values
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import (
    AdaptiveAvgPool2d,
    Add,
    AvgPool2d,
    Conv2d,
    ConvolutionOp,
    GlobalAvgPool,
    LayerOp,
    Linear,
    MaxPool2d,
    Op,
    Quantize,
    Recurrent,
    Reshape,
    Scalar,
    TorchOp,
)
from autoprune.repack.graph.ops.pooling import PoolOp
from autoprune.repack.lowering.conv_rules import is_depthwise
from autoprune.repack.weights.quads import QUAD

MAPS = 4  # axes of a feature map


def refusal(graph: Graph, op: LayerOp) -> str:
    """Why a layer cannot be int8; "" where it can."""
    if not isinstance(op, (Conv2d, Linear, Recurrent)):
        return f"there is no int8 form of {op.label}"
    if isinstance(op, Recurrent) and not op.interleaved:
        return "the gates of its units are not neighbours, since its projection does more than to feed it"
    weight = graph.constants.get(op.tensors["weight"])
    if weight is None or weight.dtype != torch.float32:
        return "its weight is not a float32 constant"
    if op.inputs[0] in graph.constants:
        return "it reads a constant"
    filters, channels = weight.shape[:2]
    if op.conv_groups == 1 or is_depthwise(op, weight):
        return ""
    if channels == 1 and filters == op.conv_groups:
        return "it is depthwise, and such a layer has no int8 form where it adds another value or takes wide steps"
    if channels % QUAD or filters // op.conv_groups % QUAD:
        return (
            f"its {op.conv_groups} groups have {channels} channels and {filters // op.conv_groups} filters each, not "
            f"multiples of {QUAD}"
        )
    return ""


def quantisable(graph: Graph) -> tuple[str, ...]:
    """The outputs of the layers that can be int8, in order."""
    return tuple(op.output for op in graph.ops if isinstance(op, LayerOp) and not refusal(graph, op))


@dataclass(frozen=True)
class Placement:
    """The values on grids.

    Attributes:
        behind: those that are moved onto a grid where they are made, in order.
        alone: those whose readers all take bytes.
        chains: int8 layer that reads bytes -> the values from its input up to the one whose grid that input is on.
        like: value -> the other value whose grid it takes: what is only joined is on the grid of the whole.
    """

    behind: tuple[str, ...]
    alone: frozenset[str]
    chains: Mapping[str, tuple[str, ...]]
    like: Mapping[str, str]

    def source(self, layer: str) -> str:
        """The value whose grid the input of an int8 layer is on."""
        return self.chains[layer][-1]


class Placing:
    """Finds the placement for any choice of int8 layers of one graph."""

    def __init__(self, graph: Graph) -> None:
        values = meta_values(graph)
        self.graph, self.producers, self.readers = graph, graph.producers(), graph.consumers()
        self.returned = set(graph.output_names())
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        self.shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        self.maps = self._feature_maps({name for name, x in tensors.items() if x.dtype == torch.float32})

    def of(self, layers: Collection[str], floats: Collection[str] = ()) -> Placement:
        """The placement where the layers with these outputs are int8; `floats` are values that some read as floats.

        Recurrent layers read projections as floats, and put their states on a grid by themselves.
        """
        layers = [name for name in layers if not isinstance(self.producers[name], Recurrent)]
        alone: set[str] = set()
        for name in [*(op.output for op in reversed(self.graph.ops)), *(each.name for each in self.graph.inputs)]:
            readers = [op for op in self.readers[name] if not _reads_extents(op)]
            kept = name in self.returned or name in floats
            if readers and not kept and all(self._takes(op, name, layers, alone) for op in readers):
                alone.add(name)
        chains = {name: tuple(self._chain(self.producers[name].inputs[0], alone)) for name in layers}
        behind = {chain[-1] for chain in chains.values()}
        self._hand_on(layers, alone, behind)
        order = [*(each.name for each in self.graph.inputs), *self.producers]
        return Placement(tuple(n for n in order if n in behind), frozenset(alone), chains, self._like(alone, behind))

    def _feature_maps(self, floats: Collection[str]) -> set[str]:
        """The values (N, C, H, W) that convolutions and poolings read or make, and sums and concatenations of those.

        Others of four axes have their features elsewhere, such as the tokens of a window or the heads of attention.
        """
        deep = {name for name in floats if len(self.shapes[name]) == MAPS}
        read = {op.inputs[0] for op in self.graph.ops if isinstance(op, (ConvolutionOp, PoolOp))}
        maps = deep & read
        for op in self.graph.ops:
            made = isinstance(op, (ConvolutionOp, PoolOp)) or (_makes_bytes(op) and maps.intersection(op.inputs))
            if made and op.output in deep:
                maps.add(op.output)
        return maps

    def _picks(self, op: Op) -> bool:
        """Whether its output's elements are some of its input's, in the input's order of channels."""
        if isinstance(op, Reshape):
            before, after = self.shapes[op.inputs[0]], self.shapes[op.output]
            if op.inputs[0] in self.maps:
                return after == (before[0], math.prod(before[1:]))
            return op.output not in self.maps and before[-1:] == after[-1:]
        return isinstance(op, MaxPool2d)

    def _takes(self, op: Op, name: str, layers: Collection[str], alone: set[str]) -> bool:
        """Whether an operation can read a value as bytes; `alone` is known of all that follows."""
        if op.output in layers:
            added = name in op.inputs[1:]
            return not added or (name in self.maps and self.shapes[name] == self.shapes[op.output])
        if self._picks(op):
            return op.output in alone
        if name not in self.maps:
            return False
        if isinstance(op, GlobalAvgPool):
            return any(self._takes(reader, op.output, layers, alone) for reader in self.readers[op.output])
        return _makes_bytes(op) and op.output in alone

    def _chain(self, name: str, alone: set[str]) -> Iterator[str]:
        """A value, and those above it that it has been picked from."""
        yield name
        op = self.producers.get(name)
        if op is not None and self._picks(op) and {name, op.inputs[0]} <= alone:
            yield from self._chain(op.inputs[0], alone)

    def _hand_on(self, layers: Collection[str], alone: set[str], behind: set[str]) -> None:
        """Adds the maps that are made of bytes and read as bytes, such as residuals."""
        on_grid = set(behind)
        for op in self.graph.ops:
            from_bytes = bool(on_grid.intersection(op.inputs))
            if self._picks(op) and from_bytes and op.output in alone:
                on_grid.add(op.output)
            elif (
                op.output in self.maps & alone and (op.output in layers or (_makes_bytes(op) and from_bytes))
            ):  # fmt: skip
                behind.add(op.output)
                on_grid.add(op.output)

    def _like(self, alone: set[str], behind: set[str]) -> dict[str, str]:
        return {
            name: op.output
            for op in self.graph.ops if _joins(op) and op.output in behind
            for name in op.inputs if name in behind & alone and self.readers[name] == [op]
        }  # fmt: skip


def _reads_extents(op: Op) -> bool:
    return isinstance(op, Scalar)


def _makes_bytes(op: Op) -> bool:
    """Whether it makes a map on a grid of maps on grids."""
    return isinstance(op, (AvgPool2d, AdaptiveAvgPool2d, Add)) or _joins(op)


def _joins(op: Op) -> bool:
    """Whether it lays maps beside each other along their channels."""
    if not isinstance(op, TorchOp) or op.op != "aten.cat.default":
        return False
    return op.named_args().get("dim", 0) in (1, 1 - MAPS)


@dataclass(frozen=True)
class Int8Layer:
    """What an int8 layer has in the place of its own weight.

    Attributes:
        weight: float32, multiples of the filters' scales.
        scales: ``(out,)``.
    """

    weight: Tensor
    scales: Tensor

    @property
    def fits(self) -> bool:
        """Whether no sum of products can exceed 32 bits, whatever the input."""
        per_filter = self.scales.reshape(-1, *[1] * (self.weight.ndim - 1))
        steps = (self.weight / per_filter).round().abs().flatten(1).sum(dim=1, dtype=torch.float64)
        return bool((steps * (2 * WEIGHT_LEVELS + 1) < 2**31).all())


def with_int8_layers(
    graph: Graph, placement: Placement, grids: Mapping[str, Grid], layers: Mapping[str, Int8Layer]
) -> Graph:
    """The graph with values moved onto their grids, and with the weights and scales of int8 layers."""
    edited = Editor(graph)
    names = {value: edited.free_name(f"{value} on grid") for value in placement.behind}
    moved = {value: Quantize(names[value], (value,), **vars(grids[value])) for value in placement.behind}
    ops: list[Op] = [moved[each.name] for each in graph.inputs if each.name in moved]
    for op in graph.ops:
        ops.append(_redirected(op, placement, names))
        if op.output in moved:
            ops.append(moved[op.output])
    edited.ops = {op.output: op for op in ops}
    for name, layer in layers.items():
        edited.ops[name] = edited.with_weights(edited.ops[name], weight=layer.weight, scale=layer.scales)
    return edited.graph()


def _redirected(op: Op, placement: Placement, names: Mapping[str, str]) -> Op:
    """An operation that reads the rounded values, where it is to."""
    for name in op.reads:
        if name in names and name in placement.alone:
            op = op.with_input(name, names[name])
    if op.output in placement.chains and op.inputs[0] in names:
        op = replace(op, inputs=(names[op.inputs[0]], *op.inputs[1:]))
    return op
