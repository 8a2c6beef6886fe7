"""Bias correction: what quantisation adds to a filter's sums on average is subtracted from its bias.

Layer after layer, each reading what the int8 layers before it give once they are corrected, as in "Data-Free
Quantization through Weight Equalization and Bias Correction" (Nagel et al., ICCV 2019), section 4.2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autoprune.repack.graph.editor import Editor
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp, Op, Values
from autoprune.repack.quantize.batches import Batch, walked
from autoprune.repack.quantize.fit import weighted_sums

AGREE = 4  # half the samples tell the mean error a, the others b: where 4ab > a^2 + b^2 each lowers the others' error


def with_corrected_biases(graph: Graph, quantised: Graph, layers: Collection[str], batches: Sequence[Batch]) -> Graph:
    """The quantised graph with other biases in its int8 layers.

    All batches are on their way at a time.

    Args:
        graph: of floats.
        quantised: the same with int8 layers.
        layers: their outputs.
        batches: as `fitting_batches` gives them.
    """
    edited = Editor(quantised)
    for name in layers:
        op, weight = edited.ops[name], edited.weight(edited.ops[name], "weight")
        bias = edited.weight(op, "bias") if "bias" in op.tensors else torch.zeros(len(weight))
        edited.ops[name] = edited.with_weights(op, bias=bias)
    own = edited.graph()
    constants = dict(own.constants)
    corrected = replace(own, constants=constants)  # whose biases change while it runs
    exact = graph.producers()
    walks = [(walked(graph, batch), walked(corrected, batch)) for batch in batches]
    values: list[Values] = [{} for _ in batches]
    with torch.inference_mode():
        for op in corrected.ops:
            floats = [_until(walk, op.output) for walk, _ in walks] if op.output in exact else []
            if op.output in layers:
                error = _MeanError()
                for before, now in zip(floats, values, strict=True):
                    sums = _sums(exact[op.output], before, graph)
                    error.add(_sums(op, now, corrected) - sums)
                constants[op.tensors["bias"]] = (constants[op.tensors["bias"]].double() - error.mean()).float()
            values = [_until(walk, op.output) for _, walk in walks]
    made = {name: value.clone() for name, value in constants.items() if value.is_inference()}
    return replace(corrected, constants=constants | made)


def _until(walk: Iterator[tuple[Op, Values]], output: str) -> Values:
    """Runs on to the operation with this output."""
    return next(values for op, values in walk if op.output == output)


def _sums(op: Op, values: Values, graph: Graph) -> Tensor:
    assert isinstance(op, LayerOp)
    return weighted_sums(op, values[op.inputs[0]], graph.constants[op.tensors["weight"]])


class _MeanError:
    """The mean of each filter's errors, told by every other sample and by those between."""

    def __init__(self) -> None:
        self._sums: list[Tensor | float] = [0.0, 0.0]
        self._counts = [0, 0]
        self._samples = 0

    def add(self, error: Tensor) -> None:
        """Adds the errors ``(samples, positions, filters)`` of one batch."""
        for half in (0, 1):
            own = error[(half + self._samples) % 2 :: 2]
            self._sums[half] = self._sums[half] + own.sum((0, 1), dtype=torch.float64)
            self._counts[half] += own.shape[:2].numel()
        self._samples += len(error)

    def mean(self) -> Tensor | float:
        """Of each filter, ``(filters,)``; 0 where the halves do not agree, or there is one sample alone."""
        if not all(self._counts):
            return 0.0
        first, second = (torch.as_tensor(total) / count for total, count in zip(self._sums, self._counts, strict=True))
        agree = AGREE * first * second > first.square() + second.square()
        return torch.where(agree, (self._sums[0] + self._sums[1]) / sum(self._counts), 0.0)
