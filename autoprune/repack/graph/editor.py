"""A graph under work: operations by the value they define, in the order they run, with what passes ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from autoprune.repack.graph import extents
from autoprune.repack.graph.aten import decode_dtype
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Op
from autoprune.repack.graph.reference import evaluate_op

AnyOp = TypeVar("AnyOp", bound=Op)

# Hardly any model's own extents, so that equal ones are equal at every call; they have many divisors.
FREE = (5040, 3360, 2016, 6720, 4032, 10080, 8064, 7560, 9240, 12096, 15120, 20160, 25200, 27720)
FREE_OF_MANY = (24, 60, 36, 84, 72, 90, 96, 48)  # where more than three are free: a tensor's size must fit 64 bits


class Editor:
    """Wraps a graph; `graph` gives what became of it, without what nothing reads.

    Attributes:
        ops: value -> the operation that defines it, in the order they run.
        constants: of the graph, and those made since.
        shapes: of every value, of `unusual` extents where a call may choose them; () for integers.
    """

    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs, self.conditions = graph.inputs, graph.outputs, graph.conditions
        self.returned = set(graph.output_names())
        self.ops = {op.output: op for op in graph.ops}
        self.constants = dict(graph.constants)
        self.readers: dict[str, list[str]] = {}
        self.prune()
        self.shapes = infer_shapes(graph)

    def graph(self) -> Graph:
        self.prune()
        return Graph(self.inputs, tuple(self.ops.values()), self.outputs, self.constants, self.conditions)

    def prune(self) -> None:
        """Drops what neither an output nor another operation reads, and finds the readers anew."""
        needed = set(self.returned)
        for op in reversed(self.ops.values()):
            if op.output in needed:
                needed.update(op.reads, op.tensors.values())
        self.ops = {name: op for name, op in self.ops.items() if name in needed}
        self.constants = {name: value for name, value in self.constants.items() if name in needed}
        self.readers = {}
        for op in self.ops.values():
            for name in op.reads:
                self.readers.setdefault(name, []).append(op.output)

    def only_reader(self, op: Op, reader: Op) -> bool:
        """Whether nothing but `reader` needs the value that `op` defines, and it only as one operand."""
        alone = self.readers.get(op.output) == [reader.output] and op.output not in self.returned
        return alone and reader.inputs.count(op.output) == 1

    def weight(self, op: Op, role: str) -> Tensor:
        return self.constants[op.tensors[role]]

    def weights(self, op: Op) -> dict[str, Tensor]:
        return {role: self.constants[name] for role, name in op.tensors.items()}

    def with_weights(self, op: AnyOp, **weights: Tensor) -> AnyOp:
        """The operation with weights of its own; those it shared stay as they are for the others."""
        named = {role: self.constant(f"{op.output}.{role}", value) for role, value in weights.items()}
        return replace(op, tensors={**op.tensors, **named})

    def constant(self, name: str, value: Tensor) -> str:
        """Adds a constant and returns the name it got."""
        name = self.free_name(name)
        self.constants[name] = value.detach().contiguous()
        return name

    def replace(self, op: Op, by: Op) -> None:
        """Puts one operation in the place of another that defines the same value."""
        assert op.output == by.output
        self.ops[op.output] = by
        self.prune()

    def expand(self, op: Op, ops: Sequence[Op]) -> None:
        """Puts several operations in the place of one; the last defines its value, the others new ones."""
        assert ops[-1].output == op.output
        self.ops = {
            each.output: each
            for name, old in self.ops.items() for each in (ops if name == op.output else (old,))
        }  # fmt: skip
        self.prune()
        self.shapes = infer_shapes(self.graph())

    def free_name(self, name: str) -> str:
        """The name, changed where it is taken."""
        taken = {each.name for each in self.inputs}
        while name in self.constants or name in self.ops or name in taken:
            name += "_"
        return name

    def merge(self, first: Op, second: Op, merged: Op) -> None:
        """Makes one operation of two, in the place of the second: all that either reads is defined by then."""
        assert merged.output == second.output
        del self.ops[first.output]
        self.replace(second, merged)

    def bypass(self, op: Op, source: str) -> bool:
        """Lets the readers of an operation that does nothing read its operand; not where it is returned."""
        if op.output in self.returned:
            return False
        for name in self.readers.get(op.output, ()):
            self.ops[name] = self.ops[name].with_input(op.output, source)
        del self.ops[op.output]
        self.prune()
        return True


def unusual(graph: Graph) -> dict[int, int]:
    """Free extents that the graph takes and that are, as far as can be, no other extents of it."""
    own = extents.examples(graph.inputs)
    taken = {extent for value in graph.constants.values() for extent in value.shape}
    taken |= {extent for each in graph.inputs for extent in each.shape}

    def candidates(number: int) -> Iterable[int]:  # where the model bounds it, something near
        return (*(FREE if len(own) <= 3 else FREE_OF_MANY), *range(2 * own[number], 1, -1))

    return extents.choose(own, graph.conditions, candidates, taken)


def infer_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """The shape of every value, of `unusual` extents where a call may choose; () for integers. Computes nothing."""
    return {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in meta_values(graph).items()}


def meta_values(graph: Graph) -> dict[str, Any]:
    """Every value on the meta device, or an integer; of `unusual` extents where a call may choose."""
    constants: Mapping[str, Tensor] = {name: value.to("meta") for name, value in graph.constants.items()}
    values: dict[str, Any] = {}
    for each, shape in zip(graph.inputs, extents.with_extents(graph.inputs, unusual(graph)), strict=True):
        values[each.name] = torch.empty(shape, dtype=decode_dtype(each.dtype), device="meta")
    for op in graph.ops:
        values[op.output] = evaluate_op(op, values, constants)
    return values
