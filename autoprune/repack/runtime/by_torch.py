"""Running a graph where no kernel can be compiled: by torch's own functions. Slower, and right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autoprune.errors import AutopruneError
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.reference import reference
from autoprune.repack.lowering.weights import Weights


class TorchPlan:
    """Stands for the plans of a program, for inputs of any shape.

    Args:
        graph: of the program.
        weights: of every packed layer, by the name of its output; unpacked once.
    """

    memory = 0  # that lies ready for the next call

    def __init__(self, graph: Graph, weights: Mapping[str, Weights]) -> None:
        constants, ops = dict(graph.constants), []
        for op in graph.ops:
            if op.output in weights:
                weight, bias = op.tensors["weight"], f"{op.output}.bias"
                if constants[weight].is_meta:
                    constants[weight] = weights[op.output].packed.unpack()
                constants[bias] = torch.from_numpy(weights[op.output].bias)  # the graph of a single layer has none
                op = replace(op, tensors={**op.tensors, "bias": bias})
            ops.append(op)
        self._graph = replace(graph, ops=tuple(ops), constants=constants)

    def forget(self) -> None:
        """As of a plan: frees what lies ready for the next calls."""

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """One call's outputs."""
        try:
            with torch.no_grad():
                outputs = reference(self._graph, inputs)
        except FAILURES as error:
            raise AutopruneError(f"the program does not take these values: {error}") from error
        # Whoever gets them may write to them: they must be neither inputs nor weights.
        return pytree.tree_map_only(Tensor, torch.clone, outputs)
