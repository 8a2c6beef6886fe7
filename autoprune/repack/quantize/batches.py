"""Calibration batches, and running a graph on them an operation at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments
from autoprune.quantization import Observer
from autoprune.repack.graph.calls import Signature
from autoprune.repack.graph.extents import check_shapes
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Op, Values
from autoprune.repack.graph.reference import evaluate_op

Batch = tuple[Tensor, ...]
"""The tensors of one call, in the order of the graph's inputs."""


def batches_of(calibration: Iterable[Any], model: nn.Module, example: Arguments) -> list[Batch]:
    """The tensors of batches that are given as the model is called.

    Args:
        calibration: the batches.
        model: called with them.
        example: arguments of one call, in order: those of a batch must be built like them.

    Raises:
        AutopruneError: it is one batch, or none of these things; or one has other arguments, such as labels.
    """
    if isinstance(calibration, Tensor | nn.Module | str) or not isinstance(calibration, Iterable):
        raise AutopruneError(
            f"calibration is a list of batches, each as the model is called, not {type(calibration).__name__}."
        )
    signature, batches = Signature.of(model, example), list[Batch]()
    for number, batch in enumerate(calibration, 1):
        given = Arguments.of(batch)
        try:
            tensors = signature.tensors(given.args, given.kwargs)
        except AutopruneError as error:
            raise AutopruneError(
                f"calibration batch {number} does not fit: {error} Give each batch as the model is called, without "
                "labels."
            ) from error
        batches.append(tuple(x.detach().cpu() for x in tensors))
    return batches


def fitting_batches(graph: Graph, batches: Sequence[Batch]) -> list[Batch]:
    """The batches as the graph takes them: one of more samples than a graph of a fixed batch size takes is cut.

    The last piece shares samples with the one before it where the batch is no multiple.

    Raises:
        AutopruneError: there is none, or one does not fit the graph.
    """
    if not batches:
        raise AutopruneError(
            "quantising a model needs calibration data: a few batches of inputs as the model will see them; none was "
            "given."
        )
    fitting: list[Batch] = []
    for number, batch in enumerate(batches, 1):
        try:
            fitting += _pieces(graph, tuple(batch))
        except AutopruneError as error:
            raise AutopruneError(f"calibration batch {number} does not fit: {error}") from error
    return fitting


def _pieces(graph: Graph, batch: Batch) -> list[Batch]:
    if len(batch) == len(graph.inputs):
        for given, x in zip(graph.inputs, batch, strict=True):
            if str(x.dtype) != f"torch.{given.dtype}":
                raise AutopruneError(f"the input {given.name!r} is {given.dtype}, not {str(x.dtype)[6:]}.")
            if x.ndim and not len(x):
                raise AutopruneError(f"the input {given.name!r} has the shape {tuple(x.shape)}, without a sample.")
    pieces = _cut(graph, batch)
    for piece in pieces:
        check_shapes(graph.inputs, graph.conditions, [tuple(x.shape) for x in piece])
    return pieces


def _cut(graph: Graph, batch: Batch) -> list[Batch]:
    """Pieces of as many samples as the example had, where the graph takes no other number of them."""
    if len(batch) != len(graph.inputs) or not batch or not batch[0].ndim or any(each.batched for each in graph.inputs):
        return [batch]
    samples, size = len(batch[0]), next(iter(graph.inputs[0].shape), 0)
    if not 0 < size < samples:
        return [batch]
    cut = [each.shape[:1] == (size,) and x.shape[:1] == (samples,) for each, x in zip(graph.inputs, batch, strict=True)]
    starts = [min(start, samples - size) for start in range(0, samples, size)]
    return [tuple(x[start : start + size] if own else x for own, x in zip(cut, batch, strict=True)) for start in starts]


def walked(graph: Graph, batch: Batch) -> Iterator[tuple[Op, Values]]:
    """Runs a graph by torch's own functions: each operation, once it has run, with the values there are then.

    These are its operands and its output, what is returned, and what later operations read.
    """
    last = {name: number for number, op in enumerate(graph.ops) for name in op.reads}
    returned = set(graph.output_names())
    values: dict[str, Any] = dict(zip((each.name for each in graph.inputs), batch, strict=True))
    for number, op in enumerate(graph.ops):
        values[op.output] = evaluate_op(op, values, graph.constants)
        yield op, values
        for name in op.reads:
            if last[name] == number and name not in returned:
                values.pop(name, None)


def returned_floats(graph: Graph, batch: Batch) -> list[Tensor]:
    """The tensors of floats that the graph returns, each once, in order."""
    values: Values = dict(zip((each.name for each in graph.inputs), batch, strict=True))
    with torch.inference_mode():
        for _, now in walked(graph, batch):
            values = now
    found = [values[name] for name in dict.fromkeys(graph.output_names()) if name in values]
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def observe(graph: Graph, batches: Sequence[Batch], names: Sequence[str]) -> Mapping[str, Observer]:
    """Runs a float graph on calibration batches and observes some of its values.

    Args:
        graph: its inputs and values are float32 where they are observed.
        batches: as `fitting_batches` gives them.
        names: of the values.

    Raises:
        AutopruneError: a value is NaN or infinite.
    """
    observers = {name: Observer(name) for name in names}
    with torch.inference_mode():
        for batch in batches:
            for each, x in zip(graph.inputs, batch, strict=True):
                if each.name in observers:
                    observers[each.name].add(x)
            for op, values in walked(graph, batch):
                if op.output in observers:
                    observers[op.output].add(values[op.output])
    return observers
