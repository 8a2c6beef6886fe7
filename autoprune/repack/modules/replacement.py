"""Repacking a model layer by layer: any architecture, any control flow.

Works on the model's own modules: batch norms are folded into the convolutions before them, ReLUs are fused behind them,
and every Conv2d and Linear becomes the fastest of its backends. What was done is checked against the original
on the example inputs; whatever does not hold is undone and said in the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.timer import Clock, Protocol, measure_together
from autoprune.masks import sparsity
from autoprune.model.arguments import Arguments
from autoprune.model.copies import copy_for_inference, has_memory, not_running, out_of_reach
from autoprune.model.inventory import watch_forward
from autoprune.model.recurrent.names import cell_of
from autoprune.model.uses import watch_weights
from autoprune.model.weights import first_names, kind_of, module_at, weight_of, weighted_layers
from autoprune.repack.modules.backends import BACKENDS, LayerForm
from autoprune.repack.modules.fusion import Fusion, find_fusions, fold_batch_norm_
from autoprune.repack.outputs import same_output
from autoprune.repack.probes import agrees, fresh
from autoprune.repack.report import DENSE, LayerReport, SwappedModel, unreached
from autoprune.repack.sparsity import sparsities

GAIN = 0.97  # a packed layer must take at most this share of the dense one's time: less is noise

Choose = Callable[[str, LayerForm], str]


def is_layer(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear | nn.LSTM | nn.GRU]:
    """Whether a module is one that a backend may replace as a whole."""
    return isinstance(module, (nn.Conv2d, nn.Linear)) or cell_of(module) is not None


def is_replaceable(model: nn.Module, layer: str) -> bool:
    """Whether a layer, by its name, is of a module that a backend may replace; other weights are packed in programs."""
    module = module_at(model, layer)
    if module is None:
        return cell_of(model.get_submodule(layer.rpartition(".")[0])) is not None
    return is_layer(module)


def lower_layer(module: nn.Module, relu: bool = False) -> dict[str, nn.Module]:
    """Every backend's form of one layer; those that do not support it are left out."""
    if not is_layer(module):
        raise AutopruneError(f"only Conv2d, Linear, LSTM and GRU layers can be lowered, not {type(module).__name__}.")
    form = LayerForm(module, relu)
    backends = {name: BACKENDS.get(name)() for name in BACKENDS}
    return {name: backend.lower(form) for name, backend in backends.items() if backend.supports(form).ok}


def swap_layers(
    original: nn.Module,
    arguments: Arguments,
    *,
    backends: Sequence[str] | None = None,
    choose: Choose | None = None,
    protocol: Protocol | None = None,
    clock: Clock = time.perf_counter,
) -> SwappedModel:
    """Repacks a copy of `original`, which is in eval mode with plain weights.

    Args:
        original: left as it is.
        arguments: of an example call, at the batch size that matters.
        backends: rows of BACKENDS to choose from besides ``dense``; all when None.
        choose: names a layer's backend without measuring, e.g. from a latency table.
        protocol: how layers are timed; ignored with `choose`.
        clock: seconds; likewise.

    Raises:
        AutopruneError: the model does not run on its example inputs, or cannot be reproduced.
    """
    for name in backends or ():
        BACKENDS.get(name)
    seen = _watch(original, arguments)
    allowed = tuple(BACKENDS if backends is None else backends)
    job = _Job(original, arguments, seen, allowed, choose, protocol or Protocol(samples=15), clock)
    return job.verified()


@dataclass(frozen=True)
class _Seen:
    """Of the original: its output, each layer's first input, what can be fused, and how sparse each weight is."""

    output: Any
    inputs: dict[str, Tensor]
    fusions: dict[str, Fusion]
    sparsities: dict[str, float]
    multiplied: dict[str, float]  # weights that the model's own code multiplies by -> their fraction of zeros


def _watch(model: nn.Module, arguments: Arguments) -> _Seen:
    layers: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if is_layer(m)}
    first: dict[str, Tensor] = {}
    multiplied: dict[str, float] = {}
    others = [name for name in first_names(model) if not is_replaceable(model, name)]

    def keep(name: str, args: tuple[Any, ...], _: Any) -> None:
        first.setdefault(name, args[0])

    inputs, by_place = arguments.tensors, arguments.by_place(model)
    try:
        with torch.inference_mode():
            with watch_forward(model, layers, keep):
                output = by_place(*fresh(inputs))
            with watch_weights(model, others, lambda name, use: multiplied.update({name: sparsity(use.weight)})):
                by_place(*fresh(inputs))
            fusions = find_fusions(model, arguments.with_tensors(fresh(inputs)))
        zeros = sparsities(model, lambda: by_place(*fresh(inputs)))
    except Exception as error:  # the model is the user's: it may raise anything
        raise not_running(error) from error
    return _Seen(output, first, fusions, zeros, multiplied)


@dataclass
class _Job:
    original: nn.Module
    arguments: Arguments
    seen: _Seen
    backends: tuple[str, ...]
    choose: Choose | None
    protocol: Protocol
    clock: Clock
    decided: dict[tuple[str, bool], tuple[LayerReport, nn.Module]] = field(default_factory=dict)

    def verified(self) -> SwappedModel:
        """Tries everything; where the output differs, without fusing; then a layer at a time."""
        refused: dict[str, str] = {}
        for fuse in (True, False):
            candidate = self.assemble(fuse, refused)
            never_ran = self.check(candidate)
            if never_ran:
                refused |= dict.fromkeys(never_ran, "its packed form never ran: the model reads its weight directly")
                candidate = self.assemble(fuse, refused)
                never_ran = self.check(candidate)
            if never_ran == []:
                return candidate
        return self.one_by_one(refused)

    def one_by_one(self, refused: Mapping[str, str]) -> SwappedModel:
        """Packs one layer after another; those that change the model's output stay dense."""
        waiting = [name for name in self.seen.inputs if name not in refused]
        refused = {**refused, **dict.fromkeys(waiting, "its packed form changes what this model computes")}
        candidate = self.assemble(False, refused)
        if self.check(candidate) is None:
            raise AutopruneError(
                "the model's copy does not reproduce its output: it is not deterministic in eval mode."
            )
        for name in waiting:
            fewer = {other: why for other, why in refused.items() if other != name}
            trial = self.assemble(False, fewer)
            if self.check(trial) == []:
                refused, candidate = fewer, trial
        return candidate

    def check(self, candidate: SwappedModel) -> list[str] | None:
        """Packed layers that never ran; None when the output is not the original's."""
        inputs, by_place = self.arguments.tensors, self.arguments.by_place
        packed = {row.name: candidate.model.get_submodule(row.name) for row in candidate.report if row.backend != DENSE}
        ran: set[str] = set()
        try:
            with torch.inference_mode(), watch_forward(candidate.model, packed, lambda name, *_: ran.add(name)):
                output = by_place(candidate)(*fresh(inputs))
            same = same_output(output, self.seen.output)
            same = same and bool(agrees(by_place(self.original), by_place(candidate), inputs))
        except Exception:  # the model's own code met a layer of another type: whatever it raises, it is undone
            return None
        return [name for name in packed if name not in ran] if same else None

    def assemble(self, fuse: bool, refused: Mapping[str, str]) -> SwappedModel:
        model = copy_for_inference(self.original)
        rows, relus, removed = [], {}, []
        for name, module in list(model.named_modules()):
            if not is_layer(module):
                continue
            fusion = self.seen.fusions.get(name, Fusion()) if fuse else Fusion()
            if fusion.batch_norm:
                assert isinstance(module, nn.Conv2d)
                fold_batch_norm_(module, model.get_submodule(fusion.batch_norm))
                model = with_submodule(model, fusion.batch_norm, nn.Identity())
                removed.append(fusion.batch_norm)
            form = LayerForm(module, fusion.relu is not None)
            row, lowered = self.lower(name, form, fuse, refused)
            relu = form.relu and row.backend != DENSE
            if relu:
                assert fusion.relu is not None
                model = with_submodule(model, fusion.relu, nn.Identity())
                removed.append(fusion.relu)
            fused = " + ".join([*(["batch norm"] if fusion.batch_norm else []), *(["relu"] if relu else [])])
            lost = "; not fused: that changes what this model computes" if self.fuses(name) and not fuse else ""
            zeros = self.seen.sparsities.get(name, row.sparsity)
            rows.append(replace(row, fused=fused, sparsity=zeros, why=row.why + lost))
            if row.backend != DENSE:
                model = with_submodule(model, name, lowered)
                relus[name] = relu
        rows += _without_form(self.original, rows)
        rows += [
            _in_code(self.original, name, zeros)
            for name, zeros in self.seen.multiplied.items()
            if not _belongs_to(self.original, name, rows)
        ]
        rows += [unreached(name, kind, why) for name, (kind, why) in out_of_reach(model).items()]
        return SwappedModel(model, rows, relus, removed)

    def fuses(self, name: str) -> bool:
        return self.seen.fusions.get(name, Fusion()) != Fusion()

    def lower(
        self, name: str, form: LayerForm, fuse: bool, refused: Mapping[str, str]
    ) -> tuple[LayerReport, nn.Module]:
        """The layer's row and what runs it; decided once, however often the model is assembled."""
        if reason := refused.get(name) or _unfit(form, self.seen.inputs.get(name)):
            return _row(name, form, DENSE, reason), form.module
        if (name, fuse) not in self.decided:
            decide = self.fastest if self.choose is None else self.chosen
            self.decided[name, fuse] = decide(name, form)
        row, lowered = self.decided[name, fuse]
        return row, form.module if row.backend == DENSE else lowered

    def chosen(self, name: str, form: LayerForm) -> tuple[LayerReport, nn.Module]:
        assert self.choose is not None
        backend = self.choose(name, form)
        member = BACKENDS.get(backend)()
        support = member.supports(form)
        if not support.ok or backend == DENSE:
            return _row(name, form, DENSE, support.why or "chosen"), form.module
        return _row(name, form, backend, "chosen"), member.lower(form)

    def fastest(self, name: str, form: LayerForm) -> tuple[LayerReport, nn.Module]:
        options = {key: BACKENDS.get(key)() for key in self.backends if key != DENSE}
        lowered = {key: backend.lower(form) for key, backend in options.items() if backend.supports(form).ok}
        if not lowered:
            why = "; ".join(backend.supports(form).why for backend in options.values())
            return _row(name, form, DENSE, why or "no other backend was allowed"), form.module
        timed = {DENSE: BACKENDS.get(DENSE)().lower(form), **lowered}
        x = self.seen.inputs[name]
        times = measure_together({key: _call(each, x) for key, each in timed.items()}, self.protocol, self.clock)
        dense_us = times.pop(DENSE).median_ms * 1e3
        best = min(times, key=lambda key: times[key].median_ms)
        packed_us = times[best].median_ms * 1e3
        if packed_us > GAIN * dense_us:
            why = f"no backend is faster here ({best}: {packed_us:.0f} us)"
            return replace(_row(name, form, DENSE, why), dense_us=dense_us, packed_us=packed_us), form.module
        row = _row(name, form, best, f"{dense_us / packed_us:.2f}x faster than dense")
        return replace(row, dense_us=dense_us, packed_us=packed_us), lowered[best]


def _without_form(model: nn.Module, rows: Sequence[LayerReport]) -> list[LayerReport]:
    """Rows of the layers of kinds that no backend has a form for."""
    known, found = {row.name for row in rows}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)) and name not in known:
            weights = [x.detach() for x in module.parameters() if x.dim() > 1]
            zeros = 1 - sum(int(x.count_nonzero()) for x in weights) / max(1, sum(x.numel() for x in weights))
            why = "it has projections (proj_size)" if isinstance(module, nn.LSTM) else "no packed form is of this kind"
            kind = type(module).__name__.lower()
            found.append(LayerReport(name, kind, zeros, 1, DENSE, None, None, "", why))
    return found


def _belongs_to(model: nn.Module, name: str, rows: Sequence[LayerReport]) -> bool:
    """Whether a layer that has a row reads this weight: it is its own by another name, or what it makes its own of."""
    names = {row.name for row in rows}
    shared = any(
        module.weight is weight_of(model, name) for at, module in weighted_layers(model).items() if at in names
    )
    return shared or name.rpartition(".")[0] in names


def _in_code(model: nn.Module, name: str, zeros: float) -> LayerReport:
    why = "no layer of its own has a packed form for it: only a program packs it"
    return LayerReport(name, kind_of(model, name), zeros, 1, DENSE, None, None, "", why)


def _row(name: str, form: LayerForm, backend: str, why: str) -> LayerReport:
    size = 1 if backend == DENSE else form.group_size
    return LayerReport(name, form.kind, form.sparsity, size, backend, None, None, "", why)


def with_submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts `module` in the place called `name`; a model that is one layer is replaced as a whole."""
    if not name:
        return module
    model.set_submodule(name, module)
    return model


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _unfit(form: LayerForm, x: Tensor | None) -> str | None:
    """Why no backend can take the layer, whatever its zeros."""
    if x is None:
        return "its forward never ran"
    if isinstance(x, Tensor) and not has_memory(x):
        return "its input is not a dense tensor"
    if form.weight.dtype != torch.float32 or x.data.dtype != torch.float32:  # a PackedSequence has data too
        return f"it runs in {x.data.dtype}"
    return form.odd_padding
