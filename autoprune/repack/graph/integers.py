"""The integers that a graph computes of extents, while it is captured: a `Scalar` each, and each once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoprune.repack.graph.freedom import Extents
from autoprune.repack.graph.ir import Input
from autoprune.repack.graph.ops import Op, Scalar
from autoprune.repack.graph.ops.scalar import SCALARS
from autoprune.repack.graph.torch_export import CaptureError


class Integers:
    """Emits integers, and knows those that are there already.

    Attributes:
        ops: the operations of the graph so far, which it adds to.
    """

    def __init__(self, ops: list[Op], inputs: Sequence[Input], extents: Extents) -> None:
        self.ops, self._inputs, self._extents = ops, inputs, extents
        self._sources: dict[str, tuple[str, int]] = {}  # symbolic extent -> the input and axis it comes from
        self._names: dict[str, str] = {}  # symbolic extent -> name

    def comes_from(self, extent: str, source: str, axis: int) -> None:
        """Tells that an axis of an input has a symbolic extent."""
        self._sources.setdefault(extent, (source, axis))

    def is_named(self, extent: torch.SymInt, name: str) -> None:
        """Tells that the value `name` is an extent."""
        self._names.setdefault(str(extent), name)

    def size(self, extent: torch.SymInt, source: str, axis: int) -> str:
        """The name of an extent that depends on the batch, which `source` has too; emitted unless it is known."""
        text = str(extent)
        if text not in self._names:
            source, axis = self._sources.get(text, (source, axis))
            self._names[text] = name = f"{source}.size{axis}"
            self.ops.append(Scalar.of(name, "size", (source, axis)))
        return self._names[text]

    def extent(self, extent: torch.SymInt) -> str:
        """The name of an extent that is computed of the inputs'."""
        text = str(extent)
        wanted = self._extents.written(extent)
        if text not in self._names:
            made = self._emitted(wanted)
            self._names[text] = made if isinstance(made, str) else self._scalar("add", (made, 0))
        return self._names[text]

    def _emitted(self, expression: Any) -> int | str:
        """An expression as `Extents.written` gives it."""
        if isinstance(expression, int):
            return expression
        if isinstance(expression, dict):
            places = {n: (each.name, axis) for each in reversed(self._inputs) for axis, n in each.free_axes.items()}
            return self._scalar("size", places[expression["extent"]])
        fn, *operands = expression
        first, *rest = map(self._emitted, operands)
        for each in rest:
            first = self._scalar(fn, (first, each))
        return first

    def _scalar(self, fn: str, args: tuple[int | str, ...]) -> str:
        for op in self.ops:
            if isinstance(op, Scalar) and (op.fn, op.args) == (fn, args):
                return op.output
        if fn not in SCALARS:
            raise CaptureError(f"the model computes an extent by {fn}, which a program cannot.")
        name = f"{fn}.{len(self.ops)}"
        self.ops.append(Scalar.of(name, fn, args))
        return name
