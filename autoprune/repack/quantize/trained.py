"""Fake quantisation of a model by its graph: each grid goes to the module that computes, or reads, the value on it.

A layer rounds what it reads by itself. A map that others read as well, as a residual sum does, must be rounded where it
is made; where no module's output is that map, as in a forward that adds by itself, it stays a map of floats.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments
from autoprune.precision import ModelPrecision
from autoprune.quantization import LEVELS, WEIGHT_LEVELS, Grid, weight_scales
from autoprune.quantization.fake import INPUT, OUTPUT, place_of, quantizable_module
from autoprune.quantization.ranges import on_scales
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import FusedLayerOp, Op
from autoprune.repack.graph.schema import validate
from autoprune.repack.outputs import same_output
from autoprune.repack.quantize.batches import Batch, walked
from autoprune.repack.quantize.placement import Int8Layer, Placement, Placing, refusal, with_int8_layers
from autoprune.repack.quantize.precision import Calibration, LayerPrecision, Quantised, Settings, is_wished

TRAINED = "trained"
"""The range method of a grid that a model was trained with."""

NOT_A_MODULE = "no Conv1d, Conv2d or Linear module of its own, called once and with a plain weight, computes it"


@dataclass(frozen=True)
class Modules:
    """Where a model's modules compute the values of its graph.

    Attributes:
        layers: output of an operation -> the module that is this layer and reads its input, and is called once.
        outputs: value -> the modules whose output it is, in the order they return: all readers read what the first
            gives.
    """

    layers: Mapping[str, str]
    outputs: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module, arguments: Arguments, captured: Graph, graph: Graph) -> Modules:
        """Runs a model on its example inputs and finds its modules' inputs and outputs among its graph's values.

        Args:
            model: in eval mode, without fake quantisation.
            arguments: of one call.
            captured: the model's graph, not simplified: in it no channel is missing.
            graph: simplified.
        """
        ops = [op for op in graph.ops if isinstance(op, FusedLayerOp) and op.layer is not None]
        wanted = {name for op in graph.ops for name in (op.output, *op.inputs)}
        values = _values(captured, arguments.tensors, wanted)
        calls = _Calls(model, values)
        calls.record(arguments)
        every = [op.layer for op in ops]
        layers = {
            op.output: op.layer for op in ops
            if op.layer is not None and every.count(op.layer) == 1 and _is_layer(model, op.layer)
            and op.inputs[0] in calls.inputs.get(op.layer, ())
        }  # fmt: skip
        return cls(layers, {value: tuple(names) for value, names in calls.outputs.items()})

    def that_round(self, model: nn.Module) -> Modules:
        """The same, of the layers that can round in this model: in the copy, weights that it computes are plain."""
        able = {value: name for value, name in self.layers.items() if quantizable_module(model.get_submodule(name))}
        return replace(self, layers=able)


def _is_layer(model: nn.Module, name: str) -> bool:
    module = dict(model.named_modules()).get(name)
    if module is None or not quantizable_module(module):
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype == torch.float32 and weight[0].numel() * LEVELS * WEIGHT_LEVELS < 2**31


def _values(graph: Graph, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
    """The values of floats with these names; but none that is constant, which could be anyone's."""
    found: dict[str, Any] = dict(zip((each.name for each in graph.inputs), batch, strict=True))
    with torch.inference_mode():
        for op, values in walked(graph, batch):
            if op.output in wanted:
                found[op.output] = values[op.output]
    return {name: x for name, x in found.items() if _tells(x)}


def _tells(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32 and x.numel() > 0 and bool(x.min() < x.max())


class _Calls:
    """What the modules of a model read and return.

    Attributes:
        inputs: module that is called once -> the values that its first argument is, whatever its shape.
        outputs: value -> modules that are called once and whose output it is, in the order they return.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        self.model, self.values = model, values
        self.inputs: dict[str, tuple[str, ...]] = {}
        self.outputs: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def record(self, arguments: Arguments) -> None:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(name)))
        try:
            with torch.inference_mode():
                arguments.call(self.model)
        finally:
            for handle in handles:
                handle.remove()
        once = {name for name, count in self._counts.items() if count == 1}
        self.inputs = {name: found for name, found in self.inputs.items() if name in once}
        self.outputs = {value: [name for name in names if name in once] for value, names in self.outputs.items()}

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._counts[name] = self._counts.get(name, 0) + 1
            x = args[0] if args else kwargs.get("input")
            if quantizable_module(module) and isinstance(x, Tensor):
                flat = x.flatten()
                self.inputs[name] = tuple(v for v, y in self.values.items() if same_output(flat, y.flatten()))

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                for value in (v for v, y in self.values.items() if same_output(output, y)):
                    self.outputs.setdefault(value, []).append(name)

        return hook


class Places:
    """Which modules round the values of a graph, so that the model computes what its int8 program will.

    Args:
        graph: simplified.
        layers: the outputs of the int8 layers, each in ``modules.layers``.
        modules: of the model.

    Attributes:
        placement: with values as floats that no module could round for all that read them.
        of: value on a grid -> the places that round it, see `attach_`.
    """

    def __init__(self, graph: Graph, layers: Sequence[str], modules: Modules) -> None:
        self._layers, self._modules, self._placing = layers, modules, Placing(graph)
        floats: set[str] = set()
        while True:
            self.placement = self._placing.of(layers, floats)
            rounded = {value: list(self._rounding(value)) for value in self.placement.behind}
            unreached = {value for made in rounded.values() for value, module in made if module is None}
            if not unreached:
                break
            floats |= unreached
        self.of = {
            value: [place_of(module, OUTPUT) for _, module in made if module is not None]
            for value, made in rounded.items()
        }
        for layer in layers:
            self.of[self.placement.source(layer)].append(place_of(modules.layers[layer], INPUT))

    def _rounding(self, value: str) -> Iterator[tuple[str, str | None]]:
        """The values that must be rounded where they are made, each with the module that makes it, if one does."""
        if value not in self.placement.alone:
            return  # int8 layers alone read it rounded, each by itself
        readers = self._placing.readers[value]
        picked = [op for op in readers if op.picks and op.output in self.placement.alone]
        if all(op in picked or self._reads(op, value) for op in readers):
            for op in picked:
                yield from self._rounding(op.output)
        else:
            yield value, next(iter(self._modules.outputs.get(value, ())), None)

    def _reads(self, op: Op, value: str) -> bool:
        """Whether an int8 layer reads a value, and not as its residual."""
        return op.output in self._layers and value not in op.inputs[1:]


def places_for(
    graph: Graph, modules: Modules, batches: Sequence[Batch], settings: Settings, precision: ModelPrecision = "int8"
) -> tuple[dict[str, Grid], tuple[LayerPrecision, ...]]:
    """The grids of a model's modules, by place, found on calibration data; and what becomes of each layer.

    Args:
        graph: simplified.
        modules: of the model.
        batches: calibration data.
        settings: with ``mixed`` precision, the layers that cost too much stay float.
        precision: of the model; by layer, the others stay float.
    """
    layers = {op.output: op for op in graph.ops if isinstance(op, FusedLayerOp)}
    wished = [name for name, op in layers.items() if is_wished(op, precision)]
    able = [name for name in wished if name in modules.layers]
    calibration = Calibration(graph, able, batches, settings)
    rows = {row.output: row for row in calibration.chosen().precisions}
    places = Places(graph, [name for name in able if rows[name].precision == "int8"], modules)
    grids = calibration.ranges.grids(places.placement)
    found = {place: grids[value] for value, of_value in places.of.items() for place in of_value}
    others = {name: LayerPrecision(op.layer_or_output, name, "float32", why=NOT_A_MODULE if name in wished else "")
              for name, op in layers.items() if name not in rows}  # fmt: skip
    return found, tuple((rows | others)[name] for name in layers)


def trained_graph(graph: Graph, modules: Modules, grids: Mapping[str, Grid]) -> Quantised:
    """The graph of a fake-quantised model, on the grids it was trained with.

    Args:
        graph: simplified, captured from the model without its fake quantisation and with rounded weights.
        modules: of the model.
        grids: its grids, by place.

    Raises:
        AutopruneError: modules that read one value have different grids.
    """
    ops = {op.output: op for op in graph.ops if isinstance(op, FusedLayerOp)}
    layers = [
        name for name, op in ops.items()
        if name in modules.layers and place_of(modules.layers[name], INPUT) in grids and not refusal(graph, op)
    ]  # fmt: skip
    known = {value: tuple(name for name in names if place_of(name, OUTPUT) in grids)
             for value, names in modules.outputs.items()}  # fmt: skip
    places = Places(graph, layers, Modules(modules.layers, known))
    on = {value: _same_grid(of_value, grids) for value, of_value in places.of.items()}
    made = {name: _rounded(graph.constants[ops[name].tensors["weight"]]) for name in layers}
    whole = validate(with_int8_layers(graph, places.placement, on, made))
    rows = tuple(_row(op, places.placement, on) for op in ops.values())
    return Quantised(whole, {name: layer.scales for name, layer in made.items()}, rows)


def _rounded(weight: Tensor) -> Int8Layer:
    """A filter has its largest magnitude at the end of its scale, as it had in training."""
    scales = weight_scales(weight)
    return Int8Layer(on_scales(weight.detach(), scales), scales)


def _same_grid(places: Sequence[str], grids: Mapping[str, Grid]) -> Grid:
    found = {grids[place] for place in places}
    if len(found) > 1:
        raise AutopruneError(
            f"{', '.join(places)} are grids of one value and differ: quantise the model anew (dequantize_, quantize_)."
        )
    return found.pop()


def _row(op: FusedLayerOp, placement: Placement, grids: Mapping[str, Grid]) -> LayerPrecision:
    layer, name = op.layer_or_output, op.output
    if name not in placement.chains:
        return LayerPrecision(layer, name, "float32", why="it was not fake-quantised")
    grid = grids[placement.source(name)]
    return LayerPrecision(layer, name, "int8", grid.scale, grid.zero_point, TRAINED)
