"""ONNX export: the masked model as smaller dense work in standard operators, for any engine that reads ONNX.

Channels that nobody needs are removed from the whole model, exactly. Of what is left, a layer whose zeros make it
faster in the engine gathers what its groups keep, or only its live channels; every other layer stays dense.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, ConfigError, MissingExtra, did_you_mean
from autoprune.files import given_path, on_disk, place_for
from autoprune.latency.engines import ENGINES
from autoprune.latency.engines.base import INSTALL
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.timer import Clock, Protocol, measure_together, speedup
from autoprune.masks import Masks, apply_masks_
from autoprune.model.arguments import Arguments
from autoprune.model.copies import check_inputs, copy_for_inference, not_running, uncompiled_
from autoprune.model.weights import kind_of, weighted_layers
from autoprune.quantization import check_plain
from autoprune.repack.graph.calls import ByPlace, input_names
from autoprune.repack.graph.capture import CaptureError, capture
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp, Recurrent
from autoprune.repack.graph.passes import simplify
from autoprune.repack.onnx.file import write_onnx
from autoprune.repack.onnx.form_choice import Choose, Chosen, Timing, choose_forms, first_calls, given_up
from autoprune.repack.onnx.forms import COMPACTED, DENSE, FORMS, GraphModule, layer_form
from autoprune.repack.outputs import difference, same_output
from autoprune.repack.probes import Shapes, agrees, fresh
from autoprune.repack.rivals import arrays_as_tensors
from autoprune.repack.runtime.program import shapes_of
from autoprune.repack.sparsity import sparsities

RIGHT, WRONG, CANNOT_RUN, NOT_INSTALLED = "right", "wrong", "cannot run", "not installed"
NOISE = 0.98  # a file this fast, as a share of the dense export's speed, is not slower


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one Conv2d or Linear.

    Attributes:
        sparsity: fraction of zeros in its weight.
        form: ``dense``; ``compacted``: dense, of fewer channels or filters; ``gathered``: what each group keeps.
        dense_us: microseconds a call of the dense layer in the engine, None when nothing was measured.
        packed_us: likewise of the fastest other form.
        why: the reason for the form.
    """

    name: str
    kind: str
    sparsity: float
    form: str
    dense_us: float | None
    packed_us: float | None
    why: str


@dataclass(frozen=True)
class EngineCheck:
    """Whether one engine computes from the file what the masked model does, for values that are not the examples'.

    Attributes:
        engine: its row of ENGINES.
        verdict: ``right``, ``wrong``, ``cannot run`` or ``not installed``.
        why: how far its output is off, or why it cannot run the file; empty where it is right.
    """

    engine: str
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.engine}: {self.verdict}{self.why and f' ({self.why})'}"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file; where its weights need more than 2 GiB they lie beside it in ``<name>.data``.
        engine: whose measurements chose the forms; None for fixed rules.
        checked: a row an engine that reads ONNX: whether it computes from the file what the masked model does.
        dynamic: whether the file takes any batch size.
        dense_bytes: of the model's own parameters and buffers.
        file_bytes: of what was written.
        dense_ms: milliseconds a call of the model exported as it stands, in `engine`; None without one.
        exported_ms: likewise of the file.
        layers: a row a layer.
    """

    path: Path
    engine: str | None
    checked: tuple[EngineCheck, ...]
    dynamic: bool
    dense_bytes: int
    file_bytes: int
    dense_ms: float | None
    exported_ms: float | None
    layers: tuple[ExportedLayer, ...]


@dataclass(frozen=True)
class _Attempt:
    """One way to export the model.

    Attributes:
        module: what is written; its outputs are the tensors the model returns, in any order.
        names: of the inputs; torch's own when None.
    """

    module: nn.Module
    batched: Sequence[bool]
    layers: tuple[ExportedLayer, ...]
    names: Sequence[str] | None = None

    def write(self, inputs: tuple[Any, ...], path: Path) -> bool:
        """Returns whether the file takes any batch size."""
        return write_onnx(self.module, inputs, self.batched, path, self.names)


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    masks: Masks | None = None,
    *,
    engine: str | None = None,
    threads: int = 1,
    choose: Choose | None = None,
    protocol: Protocol | None = None,
    clock: Clock = time.perf_counter,
) -> ExportReport:
    """Writes a model with zeros in its weights as ONNX: equal to the masked model, smaller and, where it can, faster.

    The file takes any batch size where the model does. It is compared with the model in every installed engine before
    it takes its name: `engine` must compute it rightly, or without it at least one; the report says which do.

    Args:
        model: any module that torch.export captures; left as it is.
        example_inputs: as the model is called, at the batch size that matters; see `repack`.
        path: of the file.
        masks: applied first when given; zeros in the weights alone are enough.
        engine: ``onnxruntime`` or ``openvino``: every layer's forms are timed in it, and the file is never slower there
            than the dense export. None: forms that gained in both, at the sparsities at which they did.
        threads: of one inference in the engine.
        choose: names a layer's form, ``dense``, ``compacted`` or ``gathered``, without measuring; ``dense`` where it
            has no other.
        protocol: how forms are timed.
        clock: seconds.

    Raises:
        AutopruneError: the model does not run on its example inputs, cannot be exported, or the file does not compute
            what the model does, in `engine` or in any.
        ConfigError: unknown engine or form.
        MissingExtra: what it takes is not installed.
    """
    path = given_path(path)
    if path.is_dir() or path.suffix != ".onnx":
        raise ConfigError(f"the exported file must be named like model.onnx, not {str(path)!r}.")
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise MissingExtra(f"ONNX export needs what is not installed here. Install it with: {INSTALL}")
    timing = Timing(
        None if engine is None else _engine(engine), threads, protocol or Protocol(samples=15, lead=1), clock
    )
    by_place = _runnable(model, example_inputs, masks)
    try:
        tried = _attempts(by_place, timing, choose)
    except CaptureError as error:
        tried = [_as_it_stands(by_place, f"exported as it stands: {str(error).rstrip('.')}")]
    with on_disk(path):
        path = place_for(path)
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as folder:
            return _written(by_place, path, Path(folder), tried, timing, engine)


def _runnable(model: nn.Module, example_inputs: Any, masks: Masks | None) -> ByPlace:
    """A copy of the masked model that is called by its tensors alone, once it has run on the example inputs."""
    original = copy_for_inference(model)
    check_plain(original)
    if masks:
        apply_masks_(original, masks)
    original = uncompiled_(original)
    arguments = Arguments.of(example_inputs).ordered(original)
    check_inputs(arguments.tensors, dense=True)
    by_place = ByPlace(original, arguments).eval()
    try:
        with torch.inference_mode():
            arguments.by_place(original)(*fresh(arguments.tensors))
    except Exception as error:  # the model is the user's: it may raise anything
        raise not_running(error) from error
    return by_place


def _engines() -> dict[str, OnnxEngine]:
    """Those that read ONNX and compute in float32, installed or not."""
    every = {name: ENGINES.get(name)() for name in ENGINES}
    return {name: each for name, each in every.items() if isinstance(each, OnnxEngine) and each.precision == "float32"}


def _engine(name: str) -> OnnxEngine:
    if name not in _engines():
        raise ConfigError(f"no engine {name!r} reads ONNX in float32. {did_you_mean(name, _engines())}")
    made = _engines()[name]
    if command := made.available():
        raise MissingExtra(f"{name} is not installed here. Install it with: {command}")
    return made


def _attempts(model: ByPlace, timing: Timing, choose: Choose | None) -> list[_Attempt]:
    """The chosen forms; in an engine also all layers dense, and the model as it stands, should the first be slower."""
    original, inputs = model.model, model.arguments.tensors
    graph = simplify(capture(original, model.arguments))
    if any(isinstance(op, Recurrent) for op in graph.ops):
        raise CaptureError("an LSTM or GRU is one operator in ONNX and has no other form")

    forms = {op.output: form for op in graph.ops if (form := layer_form(op, graph.constants)) is not None}
    plain = GraphModule(graph, {name: form.module for name, form in forms.items()})
    with torch.inference_mode():
        if not same_output(list(plain(*fresh(inputs), watch=True)), model(*fresh(inputs))):
            raise CaptureError("the captured graph does not reproduce the model's output")
    first = first_calls(graph, forms)
    chosen = choose_forms(graph, {name: forms[name] for name in first.values()}, plain.seen, timing, choose)
    every = [chosen]
    if timing.engine is not None and any(each.form != DENSE for each in chosen.values()):
        every.append({name: given_up(each) for name, each in chosen.items()})
    tried = []
    for each in every:
        modules = {name: FORMS[choice.form](forms[name]) for name, choice in each.items()}
        module = GraphModule(graph, {name: modules[call] for name, call in first.items()}).eval()
        rows = _rows(model, graph, {name: each[call] for name, call in first.items()})
        batched, names = zip(*((x.batched, x.name) for x in graph.inputs), strict=True)
        tried.append(_Attempt(module, batched, rows, names))
    if timing.engine is not None:
        tried.append(_as_it_stands(model, "exported as it stands: no other form of the model was as fast"))
    return tried


def _as_it_stands(model: ByPlace, why: str) -> _Attempt:
    original, inputs = model.model, model.arguments.tensors
    batched = [isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == len(inputs[0]) for x in inputs]
    zeros = sparsities(original, lambda: model(*fresh(inputs)))
    rows = tuple(
        ExportedLayer(name, kind_of(original, name), zeros[name], DENSE, None, None, why)
        for name, _ in _layers(original)
    )
    return _Attempt(model, batched, rows, input_names(original, model.arguments))


def _rows(model: ByPlace, graph: Graph, chosen: Mapping[str, Chosen]) -> tuple[ExportedLayer, ...]:
    original, inputs = model.model, model.arguments.tensors
    zeros = sparsities(original, lambda: model(*fresh(inputs)))
    layers = (op for op in reversed(graph.ops) if isinstance(op, LayerOp))
    ops = {op.layer: op for op in layers if op.layer is not None}
    rows = []
    for name, weight in _layers(original):
        if (op := ops.get(name)) is None:
            choice = Chosen(DENSE, "not found in the graph: it does not run, or another layer took it over")
            left = weight.shape
        else:
            choice = chosen.get(op.output, Chosen(DENSE, "grouped and gated convolutions and float16 have one form"))
            left = graph.constants[op.tensors["weight"]].shape
        form, why = choice.form, choice.why or "it has no zeros"
        if left[:2] != weight.shape[:2]:  # the kernel of a conv1d has an axis more there
            form = COMPACTED if form == DENSE else form
            why = f"{left[0]} of {len(weight)} filters, {left[1]} of {weight.shape[1]} channels are left"
            why += f"; {choice.why}" if choice.why else ""
        measured = (choice.dense_us, choice.packed_us)
        rows.append(ExportedLayer(name, kind_of(original, name), zeros[name], form, *measured, why))
    return tuple(rows)


def _layers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and weight of every layer that could be packed."""
    layers = ((name, module.weight) for name, module in weighted_layers(model).items())
    return [(name, weight) for name, weight in layers if isinstance(weight, Tensor)]


def _written(
    model: ByPlace, path: Path, folder: Path, tried: Sequence[_Attempt], timing: Timing, engine: str | None
) -> ExportReport:  # fmt: skip
    """Writes the first attempt that is not slower than the last, and checks it; everything in `folder` until then."""
    inputs = model.arguments.tensors
    file, dense = folder / path.name, folder / "dense.onnx"
    dense_ms = exported_ms = None
    if timing.engine is not None:
        tried[-1].write(inputs, dense)
    for attempt in tried:
        dynamic = attempt.write(inputs, file)
        if timing.engine is None:
            break
        calls = {key: timing.engine.load(at, inputs, timing.threads) for key, at in (("dense", dense), ("file", file))}
        found = measure_together(calls, timing.protocol, timing.clock)
        dense_ms, exported_ms = found["dense"].median_ms, found["file"].median_ms
        if attempt is tried[-1] or speedup(found["dense"], found["file"]) >= NOISE:
            break
    checked = _checked(model, attempt, dynamic, file, engine, timing.threads)
    beside = folder / f"{path.name}.data"
    written = [each for each in (beside, file) if each.exists()]  # the weights first: the file refers to them
    size = sum(each.stat().st_size for each in written)
    for each in written:
        each.replace(path.with_name(each.name))
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    return ExportReport(path, engine, checked, dynamic, own, size, dense_ms, exported_ms, attempt.layers)


def _checked(
    model: ByPlace, attempt: _Attempt, dynamic: bool, file: Path, engine: str | None, threads: int
) -> tuple[EngineCheck, ...]:  # fmt: skip
    """Compares the file with the model in every engine; raises AutopruneError unless those that must be are right."""
    inputs = model.arguments.tensors
    own = shapes_of(inputs)
    larger = tuple((x[0] + 1, *x[1:]) if any_ else x for x, any_ in zip(own, attempt.batched, strict=True))
    shapes = [own, larger] if dynamic else [own]
    rows = tuple(_check(made, model, inputs, shapes, file, threads) for made in _engines().values())
    tried = [row for row in rows if row.verdict != NOT_INSTALLED and engine in (None, row.engine)]
    if tried and not any(row.verdict == RIGHT for row in tried):
        raise AutopruneError(
            f"the exported file does not compute what the model computes, {'; '.join(map(str, tried))}. "
            "Nothing was written. Please report this model."
        )
    return rows


def _check(
    made: OnnxEngine, model: ByPlace, inputs: tuple[Any, ...], shapes: Sequence[Shapes],
    file: Path, threads: int,
) -> EngineCheck:  # fmt: skip
    """Compares the file with the model on other values, at all of `shapes`."""
    if made.available() is not None:
        return EngineCheck(made.name, NOT_INSTALLED)
    last: dict[str, list[Tensor]] = {}
    failed: list[str] = []

    def wanted(*given: Any) -> list[Tensor]:
        last["model"] = model(*given)
        return last["model"]

    def exported(*given: Any) -> list[Tensor]:
        try:
            last["file"] = arrays_as_tensors(cast("Sequence[Any]", made.load(file, given, threads)()))
        except AutopruneError as error:
            failed.append(str(error).rstrip("."))
            raise
        return last["file"]

    for each in shapes:
        right = agrees(wanted, exported, inputs, each)
        if failed:
            return EngineCheck(made.name, CANNOT_RUN, failed[0])
        if right is False:
            told = " and ".join(map(str, each))
            return EngineCheck(made.name, WRONG, f"{difference(last['file'], last['model'])}, for inputs of {told}")
    return EngineCheck(made.name, RIGHT)
