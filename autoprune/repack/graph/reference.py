"""Running a graph by torch's own functions, an operation at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from autoprune.repack.graph.ir import Graph, build_outputs
from autoprune.repack.graph.ops import Op, Values


class _Both(Mapping[str, Any]):
    """Values, and constants behind them."""

    def __init__(self, values: Values, constants: Values) -> None:
        self.values_, self.constants = values, constants

    def __getitem__(self, name: str) -> Any:
        return self.values_[name] if name in self.values_ else self.constants[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.values_, *self.constants))

    def __len__(self) -> int:
        return len(self.values_) + len(self.constants)


def evaluate_op(op: Op, values: Values, constants: Mapping[str, Tensor]) -> Any:
    """The output of one operation by torch's own functions, given the values so far; works on meta tensors too."""
    both = _Both(values, constants)
    weights = {role: constants[name] for role, name in op.tensors.items()}
    return op.evaluate([both[name] for name in op.inputs], weights, both)


def reference(graph: Graph, inputs: tuple[Tensor, ...]) -> Any:
    """Runs a whole graph by torch's own functions: what every other way of running it is compared with."""
    values: dict[str, Any] = {each.name: x for each, x in zip(graph.inputs, inputs, strict=True)}
    for op in graph.ops:
        values[op.output] = evaluate_op(op, values, graph.constants)
    return build_outputs(graph.outputs, _Both(values, graph.constants))
