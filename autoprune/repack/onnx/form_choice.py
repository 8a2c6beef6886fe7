"""Which form each layer of an exported model has: measured in the engine that will run it, or by fixed rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from autoprune.errors import ConfigError, did_you_mean
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.timer import Clock, Protocol
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Conv2d, LayerOp
from autoprune.repack.modules.backends import LayerForm
from autoprune.repack.onnx.file import Case, time_cases
from autoprune.repack.onnx.forms import COMPACTED, DENSE, FORMS, GATHERED, shares

BLIND: Mapping[str, float] = {COMPACTED: 0.5, GATHERED: 0.125}  # the largest shares at which every engine gained
GAIN = 0.85  # the largest share of the dense layer's time at which another form is taken: its neighbours pay too

Choose = Callable[[str, LayerForm], str]


@dataclass(frozen=True)
class Chosen:
    """The form of one layer and why, nothing where it has no zeros; see ExportedLayer."""

    form: str
    why: str
    dense_us: float | None = None
    packed_us: float | None = None


@dataclass(frozen=True)
class Timing:
    """How forms are timed; without an engine they are not."""

    engine: OnnxEngine | None
    threads: int
    protocol: Protocol
    clock: Clock


def first_calls(graph: Graph, forms: Mapping[str, LayerForm]) -> dict[str, str]:
    """Each layer -> itself, or the first with the same weights and geometry: a module that is called several times."""
    seen: dict[str, str] = {}
    first = {}
    for op in graph.ops:
        if op.output in forms:
            window = (op.stride, op.padding, op.dilation) if isinstance(op, Conv2d) else ()
            first[op.output] = seen.setdefault(repr((sorted(op.tensors.items()), window)), op.output)
    return first


def choose_forms(
    graph: Graph, layers: Mapping[str, LayerForm], seen: Mapping[str, Tensor], timing: Timing, choose: Choose | None
) -> dict[str, Chosen]:
    """A form for each of `layers`; `seen` holds their inputs."""
    if choose is not None:
        named = ((op.output, op.layer if isinstance(op, LayerOp) else None) for op in graph.ops)
        names = {output: output if layer is None else layer for output, layer in named}
        return {name: _asked_for(names[name], form, choose) for name, form in layers.items()}
    offered = {name: shares(form) for name, form in layers.items()}
    if timing.engine is None:
        return {name: _blind(form, offered[name]) for name, form in layers.items()}
    cases: dict[str, tuple[str, list[str]]] = {}  # layers that take the same time -> one of them, all of them
    for name, form in layers.items():
        shape = (form.kind, tuple(form.weight.shape), form.kind == "conv2d" and form.window, tuple(seen[name].shape))
        likeness = repr((shape, [(key, round(share, 2)) for key, share in offered[name].items()]))
        if offered[name]:
            cases.setdefault(likeness, (name, []))[1].append(name)
    tried = [
        Case(seen[name], {key: FORMS[key](layers[name]) for key in (DENSE, *offered[name])})
        for name, _ in cases.values()
    ]
    times = time_cases(tried, timing.engine, timing.threads, timing.protocol, timing.clock)
    measured = {name: _fastest(found) for (_, all_), found in zip(cases.values(), times, strict=True) for name in all_}
    return {name: measured.get(name) or _blind(form, {}) for name, form in layers.items()}


def _asked_for(name: str, form: LayerForm, choose: Choose) -> Chosen:
    wanted = choose(name, form)
    if wanted not in FORMS:
        raise ConfigError(f"unknown form {wanted!r} of layer {name!r}. {did_you_mean(wanted, FORMS)}")
    return Chosen(wanted, "chosen") if form.weight.any() else Chosen(DENSE, "every weight is zero")


def _blind(form: LayerForm, offered: Mapping[str, float]) -> Chosen:
    for name, most in BLIND.items():
        if offered.get(name, 1.0) <= most and (name != GATHERED or form.packed.taps == 1):
            return Chosen(name, f"multiplies by {offered[name]:.0%} of the weights")
    return Chosen(DENSE, "its zeros are too scattered or too few" if form.sparsity else "")


def _fastest(times: Mapping[str, float]) -> Chosen:
    dense_us = times[DENSE]
    best = min((name for name in times if name != DENSE), key=lambda name: times[name])
    if times[best] > GAIN * dense_us:
        return Chosen(DENSE, f"{best} is not clearly faster", dense_us, times[best])
    return Chosen(best, f"{dense_us / times[best]:.2f}x faster than dense", dense_us, times[best])


def given_up(chosen: Chosen) -> Chosen:
    return chosen if chosen.form == DENSE else replace(chosen, form=DENSE, why=f"{chosen.why}, the whole model is not")
