"""Multiply-accumulates of the model as a program: what is left of it once dead channels are removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.channels import sole_readers
from autoprune.repack.graph.editor import Editor, infer_shapes
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.graph.passes import simplify


def remaining_macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of one inference of the repacked program's convolutions and Linears; compiles nothing.

    Counted are the weights that are not zero, at every output position, of what is left when dead channels are gone:
    a channel that no layer reads counts neither where it is read nor where it was made.

    Args:
        model: with zeros in its weights; left as it is.
        inputs: a tensor or a tuple of them, as the model is called; the batch counts.

    Raises:
        CaptureError: the model cannot be captured as a program.
    """
    graph = simplify(capture(model, inputs))
    shapes = infer_shapes(replace(graph, inputs=tuple(replace(each, free=()) for each in graph.inputs)))
    total = 0
    for _, op in _layers(graph):
        weight = graph.constants[op.tensors["weight"]]
        total += int(torch.count_nonzero(weight)) * op.positions(shapes[op.output])
    return total


def find_readers(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Layer -> the one layer that reads its filters, for `MacsCost` with the `channel` pattern.

    A filter that the reader does not read need not be computed. Layers on a residual stream have several readers, and
    are left out.

    Args:
        model: left as it is.
        inputs: a tensor or a tuple of them, as the model is called.

    Raises:
        CaptureError: the model cannot be captured as a program.
    """
    graph = simplify(capture(model, inputs))
    names = {op.output: name for name, op in _layers(graph)}
    runs = Counter(names.values())
    return {
        names[layer]: names[reader]
        for layer, reader in sole_readers(Editor(graph)).items()
        if layer in names and reader in names and runs[names[layer]] == runs[names[reader]] == 1
    }


def _layers(graph: Graph) -> Iterator[tuple[str, LayerOp]]:
    """The model's own layers, by name: not what a pass made of its norms."""
    for op in graph.ops:
        if isinstance(op, LayerOp) and op.layer is not None and op.tensors["weight"] in graph.constants:
            yield op.layer, op
