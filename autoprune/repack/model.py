"""`repack`: a model whose weights hold zeros, pruned by anyone -> the same model, really faster.

A model that torch.export captures becomes a program of its own; any other keeps its modules and gets packed layers in
the places of its own. Either is checked against the original on the example inputs before it is returned.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.timer import Clock, Protocol, measure_together
from autoprune.masks import Masks, apply_masks_
from autoprune.masks import sparsity as fraction_of_zeros
from autoprune.model.arguments import Arguments
from autoprune.model.copies import check_inputs, copy_for_inference, not_running, uncompiled_
from autoprune.model.recurrent.modules import cut_states_
from autoprune.model.recurrent.names import cell_of
from autoprune.model.weights import first_names, kind_of, weight_of
from autoprune.precision import ModelPrecision
from autoprune.repack.bf16 import faster_layers, with_bf16
from autoprune.repack.garbage import without_full_collections
from autoprune.repack.graph.batching import apart
from autoprune.repack.graph.calls import Signature, record_classes
from autoprune.repack.graph.capture import CaptureError, capture
from autoprune.repack.graph.extents import with_extents
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Conv2d, Gate, GatedConv2d, LayerOp, Recurrent
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.proofs import proven
from autoprune.repack.int8 import Wish, freed, reproduces, with_precision
from autoprune.repack.kernels.compiler import refused, unavailable
from autoprune.repack.lowering.conv_rules import is_depthwise
from autoprune.repack.modules.methods import has_methods, sharing
from autoprune.repack.modules.replacement import GAIN, Choose, swap_layers
from autoprune.repack.outputs import same_output
from autoprune.repack.probes import agrees, fresh
from autoprune.repack.quantize import LayerPrecision
from autoprune.repack.report import DENSE, LayerReport, ProgramModel, RepackedModel, SwappedModel, unreached
from autoprune.repack.runtime.program import Program, check_threads, shapes_of
from autoprune.repack.sparsity import sparsities
from autoprune.repack.tuning.layer import Layer
from autoprune.repack.tuning.tuning import Tuned, TuningCache, faster_by_sample, streams_little, tune

Form = Literal["program", "modules"]

WHOLE = Protocol(samples=15, warmup=2)  # of a model whose layers were timed one by one


@without_full_collections()
def repack(
    model: nn.Module,
    example_inputs: Any,
    masks: Masks | None = None,
    *,
    threads: int | None = None,
    form: Form | None = None,
    backends: Sequence[str] | None = None,
    choose: Choose | None = None,
    precision: ModelPrecision = "float32",
    calibration: Iterable[Any] | None = None,
    protocol: Protocol | None = None,
    clock: Clock = time.perf_counter,
    graph: Graph | None = None,
    cache: TuningCache | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> RepackedModel:
    """Repacks a model for inference on this machine.

    Args:
        model: any module with zeros in its weights; left as it is.
        example_inputs: as the model is called, at the batch size that matters: a tensor, a tuple of positional
            arguments, a mapping of keyword arguments, or `Arguments` for both.
        masks: applied first when given; zeros in the weights alone are enough.
        threads: of one inference; as many as torch uses at the call when None.
        form: ``program``: the whole model as one program; ``modules``: packed layers in the model's own modules, which
            torch.export and torch.compile accept; None: a program where the model can be captured.
        backends: rows of BACKENDS that a layer of the ``modules`` form may have besides ``dense``; all when None.
        choose: names a layer's backend in the ``modules`` form without measuring.
        precision: ``float32``; ``bf16``: where a layer is faster so; ``int8``: bytes where a layer can be; ``mixed``:
            where it costs little; or layers' names with ``float32`` or ``int8``, others float32. A program only.
        calibration: for int8: batches of inputs, each as the model is called, from which the ranges of its activations
            are found. None of a model that `quantize_` made ready: it has the grids it was trained with.
        protocol: how layers of the ``modules`` form are timed.
        clock: seconds.
        graph: of this architecture, captured before with other weights: saves the time of capturing.
        cache: what autotuning knows already; this user's file when None.
        progress: told what is being done.

    Raises:
        AutopruneError: the model does not run on its example inputs, or cannot be reproduced, or a program was asked
            for and the model cannot be captured.
    """
    check_threads(threads)
    refused()  # before the model runs
    only_modules = form == "modules" or (form is None and (backends is not None or choose is not None))
    original = _masked_copy(model, masks)
    wish = Wish.of(original, precision, calibration, only_modules)
    arguments = Arguments.of(example_inputs).ordered(original)
    check_inputs(arguments.tensors)
    reason = ""
    if not only_modules:
        try:
            return _as_program(original, arguments, graph, threads, clock, cache, progress, wish)
        except CaptureError as error:
            if form == "program" or precision != "float32":
                raise
            reason = str(error).rstrip(".")
    swapped = swap_layers(original, arguments, backends=backends, choose=choose, protocol=protocol, clock=clock)
    return _told(swapped, "" if choose else _gained(original, swapped, arguments, protocol or WHOLE, clock), reason)


def _masked_copy(model: nn.Module, masks: Masks | None) -> nn.Module:
    original = copy_for_inference(model)
    if masks:
        apply_masks_(original, masks)
    return uncompiled_(original)


def _told(swapped: SwappedModel, gain: str, reason: str) -> SwappedModel:
    """The same model, whose rows and summary say why it is no program, for a `reason`, and what is gained."""
    if reason:
        swapped.report = tuple(_since(row, reason) for row in swapped.report)
    swapped.summary = "; ".join(filter(None, (gain, reason and f"layer by layer, since {reason}")))
    return swapped


def _gained(original: nn.Module, swapped: nn.Module, arguments: Arguments, protocol: Protocol, clock: Clock) -> str:
    """What a whole model gains by its packed layers: one by one they may be faster, and the model not."""
    given = arguments.tensors
    timed = {
        name: (lambda by_place: lambda: by_place(*fresh(given)))(arguments.by_place(model))
        for name, model in (("dense", original), ("packed", swapped))
    }
    times = measure_together(timed, replace(protocol, samples=min(protocol.samples, WHOLE.samples)), clock)
    dense_ms, packed_ms = times["dense"].median_ms, times["packed"].median_ms
    told = f"{packed_ms:.3f} ms a call, {dense_ms:.3f} ms before repacking"
    return told if packed_ms <= GAIN * dense_ms else f"nothing is gained: {told}"


def _since(row: LayerReport, reason: str) -> LayerReport:
    """The row of a layer that is packed by itself, since the whole model is no program for `reason`."""
    return row if reason in row.why else replace(row, why=f"{row.why}; layer by layer, since {reason}")


def _as_program(
    original: nn.Module, arguments: Arguments, graph: Graph | None, threads: int | None, clock: Clock,
    cache: TuningCache | None, progress: Callable[[str], None], wish: Wish,
) -> ProgramModel:  # fmt: skip
    if reason := unavailable():
        raise CaptureError(reason)
    inputs, by_place = arguments.tensors, arguments.by_place(original)
    try:
        with torch.inference_mode():
            wanted = by_place(*fresh(inputs))
    except Exception as error:  # the model is the user's: it may raise anything
        raise not_running(error) from error
    progress("capturing the model")
    known = graph.rebound(original) if graph is not None else None
    captured = known if known is not None else capture(original, arguments)
    graph = plain = simplify(captured)
    precisions: tuple[LayerPrecision, ...] = ()
    if wish.precision == "bf16":
        progress("looking which layers are faster in bf16")
        cache = cache if cache is not None else TuningCache()
        build = partial(build_whole, inputs=inputs, threads=threads, clock=clock, cache=cache, progress=progress)
        precisions = faster_layers(graph, packable, build, fresh(inputs), cache)
        if chosen := [each.output for each in precisions if each.precision == "bf16"]:
            plain = freed(graph, by_place, inputs)
            graph = with_bf16(plain, chosen)
    elif wish.precision != "float32":
        progress("quantising the model")
        plain = freed(graph, by_place, inputs)
        graph, precisions = wish.quantised(plain, captured, original, arguments)
    layers = packable(graph)
    try:
        program, tuned = build_program(graph, layers, inputs, threads, clock, cache, progress)
        with torch.inference_mode():
            program(*fresh(inputs))
    except AutopruneError as error:
        raise CaptureError(f"the captured program cannot run: {error}") from error
    made = ProgramModel(program, (), Signature.of(original, arguments), record_classes(wanted))
    if plain is graph:
        _check(original, arguments, made, wanted)
    elif not reproduces(made.by_place, graph, plain, inputs):
        raise CaptureError("the captured program does not reproduce the model with rounded layers.")
    zeros = sparsities(original, lambda: by_place(*fresh(inputs)))
    rows = _report(original, zeros, graph, layers, tuned)
    made.report = tuple(with_precision(row, precisions) for row in rows)
    if not has_methods(original) or plain is not graph:
        return made
    outputs = {op.layer or "": op.output for op in graph.ops if isinstance(op, LayerOp) and op.output in layers}
    packed = {name: program.weights[output] for name, output in outputs.items()}
    return made.with_methods(sharing(original, packed))


def _check(original: nn.Module, arguments: Arguments, made: ProgramModel, wanted: Any) -> None:
    """Compares on other values too, and on other extents: those that do not prove to be free are fixed.

    Raises:
        CaptureError: program and model differ.
    """
    inputs, program = arguments.tensors, made.program

    def without_cuts(model: ProgramModel) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
        forms = _without_cuts(original, model)
        return None if forms is None else (arguments.by_place(forms[0]), forms[1].by_place)

    def right(chosen: Mapping[int, int]) -> bool:
        shapes = with_extents(program.graph.inputs, chosen)
        own = made
        if chosen:  # whose plans for these shapes nobody needs again, and beyond what torch asks of them
            own = copy.deepcopy(made)
            own.program.graph = replace(program.graph, conditions=())
        found = agrees(arguments.by_place(original), own.by_place, inputs, shapes)
        if found is False and (forms := without_cuts(own)) is not None:
            found = agrees(*forms, inputs, shapes)
        return bool(found)

    with torch.inference_mode():
        same = same_output(made.by_place(*fresh(inputs)), wanted)
    if not same and ((forms := without_cuts(made)) is None or not _same(*forms, inputs)):
        raise CaptureError("the captured program does not reproduce the model's output.")
    if not right({}):
        raise CaptureError("the captured program does not reproduce the model's output for other values.")
    program.graph = proven(program.graph, right)


def _same(original: Callable[..., Any], made: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
    with torch.inference_mode():
        return same_output(made(*fresh(inputs)), original(*fresh(inputs)))


def _without_cuts(original: nn.Module, made: ProgramModel) -> tuple[nn.Module, ProgramModel] | None:
    """Both with whole states, for of one on the threshold either may be right; None where the model cuts none."""
    program = made.program
    ops = tuple(replace(op, threshold=0.0, keep=0) if isinstance(op, Recurrent) else op for op in program.graph.ops)
    if ops == program.graph.ops:
        return None
    whole = Program(replace(program.graph, ops=ops), program.weights, program.tilings, program.threads, program.target)
    return cut_states_(copy.deepcopy(original)), ProgramModel(whole, (), made.signature, made.classes)


def packable(graph: Graph) -> dict[str, Layer]:
    """The convolutions and Linears that are packed, by their output's name; depthwise ones have their own kernel."""
    layers = {}
    for op in graph.ops:
        if isinstance(op, LayerOp) and op.tensors["weight"] in graph.constants:
            weight = graph.constants[op.tensors["weight"]]
            if weight.dtype == torch.float32 and not is_depthwise(op, weight):
                bias = graph.constants[op.tensors["bias"]] if "bias" in op.tensors else None
                scale = graph.constants[op.tensors["scale"]] if "scale" in op.tensors else None
                together = gated_together(graph, op)
                layers[op.output] = Layer(weight, bias, op.conv_groups, together, scale, op.in_bf16)
    return layers


def gated_together(graph: Graph, op: LayerOp) -> int:
    """Neighbouring filters of a layer that a gate silences together; 0 without one."""
    if not isinstance(op, GatedConv2d) or op.filter_factors is None:
        return 0
    source = graph.producers().get(op.filter_factors)
    weight = graph.constants[op.tensors["weight"]]
    return len(weight) // len(graph.constants[source.tensors["weight"]]) if isinstance(source, Gate) else 1


def build_whole(
    graph: Graph, layers: dict[str, Layer], inputs: tuple[Tensor, ...], threads: int | None, clock: Clock,
    cache: TuningCache | None, progress: Callable[[str], None],
) -> tuple[Program, Tuned]:  # fmt: skip
    """Packs and tunes; the program keeps no dense weight of a packed layer that nothing else reads."""
    weights = {name: layer.pack(layer.sizes()[0]) for name, layer in layers.items()}
    packed = graph.packed_weights(layers)
    constants = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if name in packed else tensor
        for name, tensor in graph.constants.items()
    }
    light = replace(graph, constants=constants)
    tuned = tune(Program(light, weights, threads=threads), layers, inputs, cache, clock, progress)
    return Program(light, tuned.weights, tuned.tilings, threads), tuned


def build_program(
    graph: Graph, layers: dict[str, Layer], inputs: tuple[Tensor, ...], threads: int | None, clock: Clock,
    cache: TuningCache | None, progress: Callable[[str], None],
) -> tuple[Program, Tuned]:  # fmt: skip
    """`build_whole`, or a program that takes batches apart where that is faster."""
    whole, tuned = build_whole(graph, layers, inputs, threads, clock, cache, progress)
    light, weights = whole.graph, tuned.weights
    if not apart(light):
        return whole, tuned
    if inputs[0].shape[0] < 2:
        return Program(light, weights, tuned.tilings, threads, by_sample=streams_little(whole, inputs)), tuned
    draft, one = Program(light, weights, threads=threads, by_sample=True), tuple(x[:1] for x in inputs)
    if draft.split_plan(shapes_of(inputs)) is None:
        return whole, tuned
    single = tune(Program(light, weights, threads=1), layers, one, cache, clock, progress)
    samples = Program(light, single.weights, single.tilings, threads, by_sample=True)
    progress("the batch at once, and sample by sample")
    faster = faster_by_sample(whole, samples, (tuned, single), inputs, cache, clock)
    return (samples, single) if faster else (whole, tuned)


def _report(
    original: nn.Module, zeros: Mapping[str, float], graph: Graph, layers: dict[str, Layer], tuned: Tuned
) -> list[LayerReport]:
    by_layer = {op.layer: op for op in graph.ops if isinstance(op, LayerOp) and op.layer is not None}
    rows = [
        unreached(name, "lstm", "it has projections (proj_size)")
        for name, module in original.named_modules()
        if isinstance(module, nn.LSTM) and cell_of(module) is None
    ]
    first = first_names(original)
    named = [first.get(name, name) for name in (*zeros, *by_layer) if name in zeros or name in first]
    for name in dict.fromkeys(named):  # a shared weight once, by its first name
        weight, op = weight_of(original, name), by_layer.get(name)
        kind = kind_of(original, name) if op is None or name in zeros else op.kind
        sparsity = zeros.get(name, fraction_of_zeros(weight))
        if op is None:
            dtype = weight.dtype
            why = "the program does not call it" if dtype == torch.float32 else f"it runs in {dtype}"
            rows.append(LayerReport(name, kind, sparsity, 1, DENSE, None, None, "", why))
        elif op.output in layers:
            size, time_us = tuned.weights[op.output].packed.group_size, tuned.times_us.get(op.output)
            rows.append(LayerReport(name, kind, sparsity, size, "jit", None, time_us, _fused(op), "packed"))
        elif isinstance(op, Conv2d):
            rows.append(LayerReport(name, kind, sparsity, 1, "jit", None, None, _fused(op), "depthwise: not packed"))
        else:
            why = "its weight is not a float32 constant"
            rows.append(LayerReport(name, kind, sparsity, 1, DENSE, None, None, "", why))
    return rows


def _fused(op: LayerOp) -> str:
    gates = (("gate", op.gate), ("live", op.live)) if isinstance(op, GatedConv2d) else ()
    names = [name for name, there in gates if there]
    names += ["sum"] if op.residual is not None else []
    names += [op.last_activation] if op.last_activation is not None else []
    return " + ".join(names)
