"""Which layers of a graph are int8, and the graph in which they are.

Every layer that can be, or with mixed precision those whose quantisation does not cost too much: each layer is
quantised alone and the error at the model's output measured; then the worst of them stay float32, as few as it takes.
"""

from __future__ import annotations

import bisect
import math
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, did_you_mean
from autoprune.model.weights import first_names
from autoprune.precision import OF_LAYERS, ModelPrecision
from autoprune.quantization import METHODS, Grid
from autoprune.repack.debug import dump
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.graph.ops.recurrent import STATES
from autoprune.repack.graph.reference import evaluate_op, reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.quantize.batches import Batch, fitting_batches, observe, returned_floats, walked
from autoprune.repack.quantize.bias import with_corrected_biases
from autoprune.repack.quantize.fit import BEST, Fitted, decibels, fitted_layers, fitted_ranges, grids_of_inputs
from autoprune.repack.quantize.placement import Int8Layer, Placement, Placing, refusal, with_int8_layers

Score = Callable[[Callable[..., Any]], float]
"""A model as a function of the tensors of a batch -> how good it is; higher is better."""


@dataclass(frozen=True)
class Settings:
    """How a graph is quantised.

    Attributes:
        ranges: how the grids of activations are found: a key of METHODS, or ``best`` for the one with the least
            measured error, value by value.
        bias_correction: whether the mean error of each filter goes into its bias, if that lowers the outputs' error.
        precision: ``int8``: every layer that can be; ``mixed``: those that do not cost too much.
        least_snr_db: what the model's outputs must keep with ``mixed`` precision, where there is no `score`.
        score: what the model must keep instead.
        most_drop: of the score.
    """

    ranges: str = BEST
    bias_correction: bool = True
    precision: Literal["int8", "mixed"] = "int8"
    least_snr_db: float = 20.0
    score: Score | None = None
    most_drop: float = 0.0

    def __post_init__(self) -> None:
        for what, given, allowed in (
            ("range method", self.ranges, (*METHODS, BEST)),
            ("precision", self.precision, ("int8", "mixed")),
        ):
            if given not in allowed:
                raise AutopruneError(f"there is no {what} {given!r}. {did_you_mean(given, allowed)}")
        if math.isnan(self.least_snr_db) or not self.most_drop >= 0:
            raise AutopruneError(
                f"a least signal-to-noise ratio of {self.least_snr_db} dB and a largest drop of {self.most_drop} were "
                "given; neither may be NaN, the drop not negative."
            )


@dataclass(frozen=True)
class LayerPrecision:
    """What became of one layer.

    Attributes:
        layer: the qualified name of its module; that of its output where a pass made it.
        output: the value it defines.
        precision: ``int8``, ``bf16`` or ``float32``.
        scale: of the grid of what its weight meets, its input or a state; None where it is float32.
        zero_point: likewise.
        ranges: the range method that found the grid; None for states, whose range is known.
        snr_db: signal-to-noise ratio of its weighted sums with it alone in int8, on the calibration data.
        model_snr_db: of the model's outputs likewise; None where it was not asked for. Both without a corrected bias.
        why: the reason where it is float32; what to know about it where it is int8.
    """

    layer: str
    output: str
    precision: str
    scale: float | None = None
    zero_point: int | None = None
    ranges: str | None = None
    snr_db: float | None = None
    model_snr_db: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Quantised:
    """A graph with int8 layers.

    Attributes:
        graph: computes in floats what int8 kernels compute, up to rounding: values that int8 layers read are moved onto
            their grids, weights are multiples of the filters' scales.
        scales: output of each int8 layer -> ``(filters,)``.
        precisions: one of each layer, in the order they run.
        snr_db: signal-to-noise ratio of the model's outputs on the calibration data, the lowest where there are
            several; infinite where they hold no floats, NaN where no data was needed.
    """

    graph: Graph
    scales: Mapping[str, Tensor]
    precisions: tuple[LayerPrecision, ...]
    snr_db: float = math.nan


def is_wished(op: LayerOp, precision: ModelPrecision) -> bool:
    """Whether a layer may be int8 in a model of this precision."""
    return precision.get(op.layer_or_output) == "int8" if isinstance(precision, Mapping) else precision != "float32"


def check_named(model: nn.Module, precision: ModelPrecision) -> None:
    """Raises AutopruneError where a precision by layer names a layer that the model does not have, or none of ours."""
    if not isinstance(precision, Mapping):
        return
    known = first_names(model)
    for name, of_layer in precision.items():
        if of_layer not in OF_LAYERS:
            raise AutopruneError(f"layer {name!r}: its precision is one of {', '.join(OF_LAYERS)}, not {of_layer!r}.")
        if known.get(name) != name:
            hint = did_you_mean(str(name), known.values()) if name not in known else f"It is {known[name]!r}, shared."
            raise AutopruneError(f"precision names a layer the model does not have: {name!r}. {hint}")


def quantised_graph(
    graph: Graph, layers: Collection[str], batches: Sequence[Batch], settings: Settings | None = None
) -> Quantised:
    """Quantises a simplified graph.

    Args:
        graph: of floats.
        layers: the outputs of those that may be int8.
        batches: calibration data: the tensors of each call, in the order of the graph's inputs. A graph that takes one
            batch size alone is given pieces of that size.
        settings: the defaults when None.

    Raises:
        AutopruneError: there is no calibration data, or it does not fit the graph or is not finite.
    """
    return Calibration(graph, layers, batches, settings or Settings()).chosen()


class Calibration:
    """A graph, calibration data and what is known by them; quantises any choice of the layers."""

    def __init__(self, graph: Graph, layers: Collection[str], batches: Sequence[Batch], settings: Settings) -> None:
        self.graph, self.settings = graph, settings
        self.ops = {op.output: op for op in graph.ops if isinstance(op, LayerOp) and op.output in layers}
        if missing := sorted(set(layers) - set(self.ops)):
            raise AutopruneError(f"the graph has no layers whose outputs are {', '.join(missing)}.")
        self.why = {name: why for name, op in self.ops.items() if (why := refusal(graph, op))}
        self.candidates = [name for name in self.ops if name not in self.why]
        for op in map(self.ops.__getitem__, self.candidates):
            if not bool(torch.isfinite(graph.constants[op.tensors["weight"]]).all()):
                raise AutopruneError(
                    f"the weight of {op.layer or op.output!r} is NaN or infinite somewhere, so that it cannot be "
                    "quantised: repack a model whose training did not diverge."
                )
        self.batches = fitting_batches(graph, batches)
        self.placing = Placing(graph)
        whole = self.placing.of(self.candidates)
        observed = [*whole.behind, *(value for chain in whole.chains.values() for value in chain)]
        self.observers = observe(graph, self.batches, list(dict.fromkeys(observed)))
        self.ranges = fitted_ranges(graph, self.batches, whole, self.observers, settings.ranges)
        self.outputs = [returned_floats(graph, batch) for batch in self.batches]
        self._known: dict[tuple[str, Grid], Fitted] = {}
        self.snr_db: dict[str, float] = {}
        self.model_snr_db: dict[str, float] = {}

    def chosen(self) -> Quantised:
        """With the layers in int8 that the settings ask for."""
        return self.mixed() if self.settings.precision == "mixed" else self.quantised(())

    def quantised(self, left: Collection[str]) -> Quantised:
        """All candidates in int8 but those that are `left` in float32."""
        placement, grids, fitted = self._fitted([name for name in self.candidates if name not in left])
        self.snr_db |= {name: each.snr_db for name, each in fitted.items()}
        layers = {name: each.layer for name, each in fitted.items()}
        graph = with_int8_layers(self.graph, placement, grids, layers)
        graph, snr_db = self._corrected(graph, [name for name in layers if name in placement.chains])
        dump("quantised", validate(graph))
        rows = tuple(self._row(name, placement, grids, fitted) for name in self.ops)
        scales = {name: layer.scales for name, layer in layers.items()}
        return Quantised(graph, scales, rows, snr_db)

    def mixed(self) -> Quantised:
        """As many candidates in int8 as what is allowed lets be."""
        if self.settings.score is None and not any(self.outputs):
            raise AutopruneError(
                "the model returns no floats, whose noise would tell which layers can be int8: repack one that returns "
                "what its answer is made of, such as its logits, or take the precision 'int8'."
            )
        self.model_snr_db = self._alone()
        worst = sorted(self.model_snr_db, key=self.model_snr_db.__getitem__)
        fine = self._fine()
        enough = bisect.bisect_left(range(len(worst)), True, key=lambda count: fine(self.quantised(worst[:count])))
        for name in worst[:enough]:
            self.why[name] = f"with it alone in int8 the model's output keeps {self.model_snr_db[name]:.1f} dB"
        return self.quantised(worst[:enough])

    def _fine(self) -> Callable[[Quantised], bool]:
        """Whether a quantised graph keeps what it must."""
        score = self.settings.score
        if score is None:
            return lambda quantised: quantised.snr_db >= self.settings.least_snr_db
        least = score(partial(_call, self.graph)) - self.settings.most_drop
        return lambda quantised: score(partial(_call, quantised.graph)) >= least

    def _fitted(self, chosen: Sequence[str]) -> tuple[Placement, Mapping[str, Grid], dict[str, Fitted]]:
        """The int8 layers; without those whose sums could exceed 32 bits."""
        while True:
            placement = self.placing.of(chosen)
            grids = self.ranges.grids(placement)
            inputs = grids_of_inputs(placement, grids, chosen)
            new = {name: grid for name, grid in inputs.items() if (name, grid) not in self._known}
            if new:
                found = fitted_layers(self.graph, self.batches, new)
                self._known |= {(name, new[name]): each for name, each in found.items()}
            fitted = {name: self._known[name, grid] for name, grid in inputs.items()}
            wide = [name for name, each in fitted.items() if not each.layer.fits]
            if not wide:
                return placement, grids, fitted
            self.why |= dict.fromkeys(wide, "sums of its products could exceed 32 bits")
            self.candidates = [name for name in self.candidates if name not in wide]
            chosen = [name for name in chosen if name not in wide]

    def _row(
        self, name: str, placement: Placement, grids: Mapping[str, Grid], fitted: Mapping[str, Fitted]
    ) -> LayerPrecision:
        layer, own, alone = self.ops[name].layer_or_output, self.snr_db.get(name), self.model_snr_db.get(name)
        if name not in fitted:
            return LayerPrecision(
                layer, name, "float32", snr_db=own, model_snr_db=alone, why=self.why.get(name, "")
            )  # fmt: skip
        if name not in placement.chains:
            return LayerPrecision(layer, name, "int8", STATES.scale, STATES.zero_point, None, own, alone)
        value = placement.source(name)
        grid, seen = grids[value], self.observers[value]
        why = f"all calibration data that it read was {seen.low:g}: give data that varies" if seen.constant else ""
        method = self.ranges.method(placement, placement.like.get(value, value))
        return LayerPrecision(layer, name, "int8", grid.scale, grid.zero_point, method, own, alone, why)

    def _corrected(self, graph: Graph, layers: Collection[str]) -> tuple[Graph, float]:
        """A quantised graph, with corrected biases if that lowers the error of its outputs; and their dB."""
        snr_db = self._snr_db(graph)
        if self.settings.bias_correction and layers:
            corrected = with_corrected_biases(self.graph, graph, layers, self.batches)
            corrected_db = self._snr_db(corrected)
            if corrected_db > snr_db:
                return corrected, corrected_db
        return graph, snr_db

    def _snr_db(self, graph: Graph) -> float:
        return _lowest_snr_db(self.outputs, [returned_floats(graph, batch) for batch in self.batches])

    def _alone(self) -> dict[str, float]:
        """Candidate -> signal-to-noise ratio of the model's outputs on the first batch with it alone in int8."""
        placement, grids, fitted = self._fitted(self.candidates)
        self.snr_db |= {name: each.snr_db for name, each in fitted.items()}
        batch, found = self.batches[0], {}
        values: dict[str, Any] = dict(zip((each.name for each in self.graph.inputs), batch, strict=True))
        with torch.inference_mode():
            for op, now in walked(self.graph, batch):
                values[op.output] = now[op.output]
            for name in self.candidates:
                x = values[self.ops[name].inputs[0]]
                x = grids[placement.source(name)].rounded(x) if name in placement.chains else x
                changed = self._changed(self.ops[name], x, fitted[name].layer, values)
                outputs = [changed.get(output, values.get(output)) for output in self.graph.output_names()]
                exact = [values.get(output) for output in self.graph.output_names()]
                found[name] = _lowest_snr_db([_floats(exact)], [_floats(outputs)])
        return found

    def _changed(self, op: LayerOp, x: Tensor, layer: Int8Layer, values: dict[str, Any]) -> dict[str, Any]:
        """What the graph's values become where one layer reads `x` and is int8."""
        weights = {role: self.graph.constants[name] for role, name in op.tensors.items()}
        weights |= {"weight": layer.weight, "scale": layer.scales}
        changed = {op.output: op.evaluate([x, *(values[name] for name in op.inputs[1:])], weights, values)}
        for other in self.graph.ops:
            if other.output != op.output and any(name in changed for name in other.reads):
                changed[other.output] = evaluate_op(other, ChainMap(changed, values), self.graph.constants)
        return changed


def _call(graph: Graph, *batch: Tensor) -> Any:
    with torch.inference_mode():
        return reference(graph, batch)


def _floats(values: Sequence[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def _lowest_snr_db(exact: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> float:
    """The lowest signal-to-noise ratio of a model's outputs: `exact` and `others` hold those of each batch.

    Elements that are not finite, such as masked ones, do not count.
    """
    found = [math.inf]
    for of_batches, same in zip(zip(*exact, strict=True), zip(*others, strict=True), strict=True):
        x, y = (torch.cat([each.flatten().double() for each in outputs]) for outputs in (of_batches, same))
        counts = torch.isfinite(x)
        found.append(decibels(float(x[counts].square().sum()), float((y - x)[counts].square().sum())))
    return min(found)
