"""Capturing a model: torch.export -> our graph.

The exported program is functional (nothing is written in place) and keeps convolutions, norms and attention whole.
What `importer` has no operation for stays a torch operator; what no file could hold is a CaptureError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from autoprune.model.arguments import Arguments
from autoprune.model.channel_gates import gates
from autoprune.model.copies import copy_for_inference, has_memory, own_copy
from autoprune.model.recurrent.modules import WholeSequences, recurrent_modules
from autoprune.quantization import check_plain
from autoprune.repack.graph import torch_export
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.calls import ByPlace, Place, input_names
from autoprune.repack.graph.editor import infer_shapes
from autoprune.repack.graph.freedom import Extents
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Recurrent
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.graph.torch_export import Axes, CaptureError, IntricateExtents
from autoprune.repack.graph.translation import describe, translated
from autoprune.repack.outputs import same_output
from autoprune.tracing import tracing, unloadable

__all__ = ["CaptureError", "capture"]

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29)


def capture(model: nn.Module, inputs: Any) -> Graph:
    """Captures what `model` computes in eval mode, for inputs of any extents where the model allows it.

    Args:
        model: left as it is.
        inputs: what the model is called with, see `Arguments`. Which extents of its tensors may change, and which only
            together, is what torch.export finds the model to allow; those that cannot be captured free are fixed.

    Raises:
        CaptureError: its control flow depends on data, it writes to its inputs or buffers, draws random numbers,
            or takes or returns what is no tensor, list, tuple or dictionary.
    """
    arguments = Arguments.of(inputs).ordered(model)
    tensors = arguments.tensors
    for x in tensors:
        if not has_memory(x) or x.device.type != "cpu" or x.layout != torch.strided:
            raise CaptureError(f"only dense tensors on the CPU can be inputs of a program, not {describe(x)}.")
    if reason := unloadable():
        raise CaptureError(reason)
    copied = copy_for_inference(model)
    check_plain(copied)
    recurrent = [module for _, module in recurrent_modules(copied)]
    names = input_names(copied, arguments)
    by_place = ByPlace(_whole_operators(copied), arguments)
    with tracing():  # all of it: symbolic extents also ask what other threads trace
        for free in _freedoms(tensors, bool(recurrent)):
            for grown in _growths(tensors, recurrent, free):
                try:
                    return _captured(by_place, names, tensors, free, grown)
                except _OtherThanGrown:
                    continue
                except IntricateExtents:  # at other extents they are no simpler
                    break
                except CaptureError:  # it is made for some extents
                    if not any(free):
                        raise
    raise AssertionError("the last freedom is none")


class _OtherThanGrown(CaptureError):
    """A graph that was captured at larger extents than the examples', at which it computes something else."""


def _freedoms(inputs: Sequence[Tensor], recurrent: bool) -> Iterator[list[Axes]]:
    """Which axes of each input may become free, from all to none."""
    every: list[Axes] = [range(x.ndim) for x in inputs]
    first = tuple(inputs[0].shape[: 1 + recurrent]) if inputs else ()
    sequences: list[Axes] = [[a for a, extent in enumerate(x.shape) if extent in first] for x in inputs]
    batch: list[Axes] = [[0] if first and x.shape[:1] == first[:1] else [] for x in inputs]
    for free in (every, sequences, batch):
        if any(free):
            yield free
    yield [()] * len(inputs)


def _growths(
    inputs: Sequence[Tensor], recurrent: Sequence[nn.LSTM | nn.GRU], free: Sequence[Axes]
) -> Iterator[dict[Place, int]]:
    """Which free axes of extent 1 or 0 are captured at 2, so that they are not fixed: from most to none."""
    tried = []
    for wide in (True, False, None):
        axes = () if wide is None else _grown(inputs, recurrent, wide)
        grown = {(x, axis): 2 for x, each in enumerate(axes) for axis in each}
        grown = {place: 2 for place in grown if place[1] in free[place[0]] and inputs[place[0]].shape[place[1]] < 2}
        if grown not in tried:
            tried.append(grown)
            yield grown


def _grown(inputs: Sequence[Tensor], recurrent: Sequence[nn.LSTM | nn.GRU], wide: bool) -> list[Axes]:
    """The axes of each input that are a batch's or a sequence's; `wide`: also where there only may be steps."""
    states = {(m.num_layers * (1 + m.bidirectional), m.hidden_size) for m in recurrent}

    def of(x: Tensor) -> Axes:
        """A state before the first step has its batch on the second axis."""
        if x is not inputs[0] and x.ndim == 3 and (x.shape[0], x.shape[2]) in states:
            return [1]
        features = x.is_floating_point() and x.ndim > 1  # lie on the last axis
        axes = range(min(1 + (bool(recurrent) or (wide and x.ndim < 4)), x.ndim - features))
        return [axis for axis in axes if x.shape[axis : axis + 1] == inputs[0].shape[axis : axis + 1]]

    return [of(x) for x in inputs]


def _whole_operators(model: nn.Module) -> nn.Module:
    """Makes gates and recurrent directions operators, which torch.export would take apart; changes all but the root."""
    for gate in gates(model).values():
        gate.whole = gate.kept
    for name, module in list(recurrent_modules(model)):
        if not name:
            return WholeSequences(module)
        model.set_submodule(name, WholeSequences(module))
    return model


def _captured(
    model: ByPlace, names: Sequence[str], inputs: Sequence[Tensor], free: Sequence[Axes], grown: Mapping[Place, int],
    tied: Sequence[Sequence[Place]] = (),
) -> Graph:  # fmt: skip
    """The graph with those of the axes `free` that torch leaves free.

    Axes are captured at the extents that `grown` has for them, the examples' else; each group of those `tied` is one.
    """
    model.tied = tied
    grown = {(x, axis): extent for (x, axis), extent in grown.items() if axis in free[x]}
    program = torch_export.export(model, inputs, free, grown)
    known = Extents(torch_export.user_inputs(program))
    pinned = known.pinned()
    fixed = [(x, axis) for x, own in enumerate(free) for axis in own if known.axes[x].get(axis) in {None, *pinned}]
    if tied and all(place in fixed for group in tied for place in group):
        raise CaptureError("the model fixes these extents, alone and together.")
    others: list[tuple[Mapping[Place, int], Sequence[Sequence[Place]]]] = []
    others += [(grown, groups) for groups in _ties(inputs, fixed)] if not tied else []
    if all(extent == 2 for extent in grown.values()):  # else tried
        numbers = {place: known.axes[place[0]].get(place[1]) for place in _steps(inputs, fixed)}
        unlike = _unlike_extents(inputs, {place: n for place, n in numbers.items() if n is not None})
        others += [({**grown, **unlike}, tied)] if unlike else []
    for extents, groups in others:
        try:
            return _captured(model, names, inputs, free, extents, groups)
        except CaptureError:  # no freer so
            continue
    if pinned or any(place in grown for place in fixed):  # the program holds another extent in their place
        left = [[axis for axis in own if (x, axis) not in fixed] for x, own in enumerate(free)]
        return _captured(model, names, inputs, left, grown, tied)
    graph = _translated(program, names, inputs, model.returned.structure)
    try:
        infer_shapes(graph)
    except FAILURES as error:
        if not tied and (groups := _alike(inputs, known.axes)):
            return _captured(model, names, inputs, free, grown, groups)
        raise CaptureError(f"the captured graph does not run at other extents: {error}.") from error
    if grown and not _computes(graph, model, inputs):
        raise _OtherThanGrown("the model takes another way for larger inputs than for the examples.")
    return graph


def _steps(inputs: Sequence[Tensor], places: Sequence[Place]) -> list[Place]:
    """Those that are a batch's axis, or a sequence's."""
    found = []
    for number, axis in places:
        features = inputs[number].is_floating_point() and inputs[number].ndim > 1
        if axis < min(2 if inputs[number].ndim < 4 else 1, inputs[number].ndim - features):
            found.append((number, axis))
    return found


def _ties(inputs: Sequence[Tensor], fixed: Sequence[Place]) -> Iterator[list[list[Place]]]:
    """Axes of batches and sequences that torch fixes and that may have one extent: those of one place, or all."""
    found = []
    for same_place in (True, False):
        groups: dict[Any, list[Place]] = {}
        for number, axis in _steps(inputs, fixed):
            groups.setdefault((inputs[number].shape[axis], axis if same_place else 0), []).append((number, axis))
        several = [group for group in groups.values() if len({number for number, _ in group}) > 1]
        if several and several not in found:
            found.append(several)
            yield several


def _alike(inputs: Sequence[Tensor], numbers: Sequence[Mapping[int, int]]) -> list[list[Place]]:
    """Axes of one place and extent that torch tells apart, such as the steps of keys and of values of a cache."""
    groups: dict[tuple[int, int], list[Place]] = {}
    for x, axes in enumerate(numbers):
        for axis in axes:
            groups.setdefault((axis, inputs[x].shape[axis]), []).append((x, axis))
    return [group for group in groups.values() if len({numbers[x][axis] for x, axis in group}) > 1]


def _unlike_extents(inputs: Sequence[Tensor], numbers: Mapping[Place, int]) -> dict[Place, int]:
    """An extent for each number that divides nothing: torch may have fixed the example's for what it divides."""
    taken = {extent for x in inputs for extent in x.shape}
    primes = (each for each in _PRIMES if each not in taken)
    extents = dict(zip(sorted(set(numbers.values())), primes, strict=False))
    return {place: extents[number] for place, number in numbers.items() if number in extents}


def _translated(program: ExportedProgram, names: Sequence[str], inputs: Sequence[Tensor], returned: Any) -> Graph:
    if torch_export.is_functional(program.graph):
        try:
            return validate(translated(program, names, inputs, returned))
        except CaptureError:  # an operator that is one of several simpler ones
            pass
    return validate(translated(torch_export.functional(program), names, inputs, returned))


def _computes(graph: Graph, model: ByPlace, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph gives on the examples what the model does; not asked where states are cut at a threshold."""
    if any(op.threshold or op.keep for op in graph.ops if isinstance(op, Recurrent)):
        return True
    flat = replace(graph, outputs={"list": graph.output_names()})
    try:
        with torch.inference_mode():
            pairs = model(*map(own_copy, inputs)), reference(flat, tuple(map(own_copy, inputs)))
    except FAILURES:
        return False
    wanted, got = ([x for x in each if isinstance(x, Tensor)] for each in pairs)
    return same_output(got, wanted)
