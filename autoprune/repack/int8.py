"""Which layers of a captured model become int8, and whether the program computes what was decided.

A program of bytes does not give the model's outputs to the last digits: it is compared with the quantised graph run by
torch, and that graph, before it was quantised, with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments
from autoprune.precision import PRECISIONS, ModelPrecision
from autoprune.quantization import Grid, dequantize_, grids_of
from autoprune.repack.graph.extents import with_extents
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.graph.proofs import proven
from autoprune.repack.graph.reference import reference
from autoprune.repack.kernels.compiler import host
from autoprune.repack.lowering.bf16_rules import lacking
from autoprune.repack.outputs import noise_of, same_output
from autoprune.repack.probes import agrees, fresh, probes
from autoprune.repack.quantize import (
    LayerPrecision,
    Modules,
    Settings,
    batches_of,
    check_named,
    is_wished,
    order_channels,
    quantised_graph,
    trained_graph,
)
from autoprune.repack.report import LayerReport

# A value near a tie may be rounded otherwise, and in a deep model one step grows to as much as quantising itself does:
# two right programs differ by sqrt(2) of that.
NOISE = 1.5
LEAST = 1e-4  # of the outputs' size
_WITHOUT_DATA = ("float32", "bf16")
FEW, MORE = 256, 7  # numbers that outputs hold; inputs that are tried then


@dataclass(frozen=True)
class Wish:
    """What precision a model's layers are to have, and where the grids of its values come from.

    Attributes:
        precision: ``float32``; ``bf16``: layers that are faster so; ``int8``: every layer that can be; ``mixed``: those
            that cost little; by layer: those that are named int8.
        calibration: batches of inputs, each as the model is called.
        grids: of a fake-quantised model, by place; empty of any other.
    """

    precision: ModelPrecision
    calibration: Iterable[Any] | None
    grids: Mapping[str, Grid]

    @classmethod
    def of(cls, model: nn.Module, precision: ModelPrecision, calibration: Iterable[Any] | None, modules: bool) -> Wish:
        """For a model of our own, whose fake quantisation is taken off, in a form of `modules` or a program's.

        Raises AutopruneError as `check` does.
        """
        wish = cls(precision, calibration, grids_of(model))
        check_named(model, precision)
        wish.check(modules)
        dequantize_(model, rounded=True)
        return wish

    def check(self, modules: bool) -> None:
        """Raises AutopruneError unless it is one that the form has, with data where it needs it, and only there."""
        if self.precision not in PRECISIONS and not isinstance(self.precision, Mapping):
            raise AutopruneError(
                f"precision is one of {', '.join(PRECISIONS)}, or maps layers to theirs, not {self.precision!r}."
            )
        if isinstance(self.precision, Mapping) and self.grids:
            raise AutopruneError(
                "the model is fake-quantised, which says already which of its layers are int8: repack it with "
                "precision='int8', or make it plain before, with autoprune.dequantize_(model)."
            )
        if modules and self.precision != "float32":
            raise AutopruneError(f"precision={self.precision!r} needs the form 'program': packed modules are float32.")
        if self.precision == "bf16" and (reason := lacking(host())):
            raise AutopruneError(reason)
        if self.precision in _WITHOUT_DATA and self.grids:
            raise AutopruneError(
                "the model is fake-quantised: repack it with precision='int8', or make it plain before, with "
                "autoprune.dequantize_(model)."
            )
        if self.precision in _WITHOUT_DATA and self.calibration is not None:
            told = f"calibration batches are for precision='int8' or 'mixed'; {self.precision} needs none."
            raise AutopruneError(told)
        if self.grids and self.calibration is not None:
            raise AutopruneError(
                "the model is fake-quantised and was trained with its grids: leave calibration out, or calibrate it "
                "anew after autoprune.dequantize_(model)."
            )
        if self.precision not in _WITHOUT_DATA and self.calibration is None and not self.grids:
            raise AutopruneError(
                f"precision={self.precision!r} needs calibration=batches: some inputs of the model, as it will see "
                "them, from which the ranges of its activations are found (four batches of 32 are plenty)."
            )

    def quantised(
        self, graph: Graph, captured: Graph, model: nn.Module, arguments: Arguments
    ) -> tuple[Graph, tuple[LayerPrecision, ...]]:
        """The graph with its layers in int8, each where its precision says so; and what became of each layer.

        Args:
            graph: simplified, in float32.
            captured: before it was simplified.
            model: that it was captured from, without fake quantisation.
            arguments: that the model is called with.
        """
        ordered = order_channels(graph)
        if self.calibration is None:
            made = trained_graph(ordered, Modules.of(model, arguments, captured, graph), self.grids)
        else:
            layers = [op.output for op in graph.ops if isinstance(op, LayerOp) and is_wished(op, self.precision)]
            chosen: Literal["int8", "mixed"] = "mixed" if self.precision == "mixed" else "int8"
            batches = batches_of(self.calibration, model, arguments)
            made = quantised_graph(ordered, layers, batches, Settings(precision=chosen))
        return made.graph, made.precisions


def freed(graph: Graph, original: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Graph:
    """The graph, not yet quantised, with those extents free at which it computes what the model does."""

    def right(chosen: Mapping[int, int]) -> bool:
        shapes = with_extents(graph.inputs, chosen)
        return bool(agrees(original, partial(_by_torch, graph), inputs, shapes, _same))

    return proven(graph, right)


def _by_torch(graph: Graph, *inputs: Tensor) -> Any:
    return reference(graph, inputs)


def _same(got: Any, wanted: Any) -> bool:
    return same_output(tensors_in(got), tensors_in(wanted))


def tensors_in(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors in a model's outputs, in order."""
    return Arguments(outputs).tensors


def reproduces(made: Callable[..., Any], graph: Graph, plain: Graph, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a program computes what its quantised graph says, as far as roundings that fall otherwise let it.

    Args:
        made: the program, called with the graph's inputs.
        graph: quantised.
        plain: the same before it was quantised.
        inputs: to try; others like them are tried, too, where the outputs are few numbers, whose errors vary by chance.
    """
    runs = (partial(_by_torch, graph), partial(_by_torch, plain), made)
    with torch.inference_mode():
        tried = [[tensors_in(run(*fresh(inputs))) for run in runs]]
        if sum(x.numel() for x in tried[0][0]) < FEW:
            drawn = [next(probes(inputs, seed=seed)) for seed in range(MORE)]
            tried += [[tensors_in(run(*fresh(given))) for run in runs] for given in drawn]
    wanted, whole, got = (
        [torch.cat([x.flatten() for x in output]) for output in zip(*(sample[at] for sample in tried), strict=True)]
        for at in range(len(runs))
    )
    return noise_of(got, wanted) <= max(LEAST, NOISE * noise_of(wanted, whole))


def with_precision(row: LayerReport, precisions: Iterable[LayerPrecision]) -> LayerReport:
    """A layer's row with what became of its precision."""
    for each in precisions:
        if each.layer == row.name:
            snr_db = each.snr_db if each.snr_db is not None and math.isfinite(each.snr_db) else None  # no error at all
            return replace(
                row, precision=each.precision, scale=each.scale, zero_point=each.zero_point, snr_db=snr_db,
                why=f"{row.why}; {each.why}" if each.why else row.why,
            )  # fmt: skip
    return row
