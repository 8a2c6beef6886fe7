"""Model + example inputs -> which layers can be pruned, and which stay dense and why.

The model is run once and watched: every weight is asked for by what multiplies by it, whatever module holds it. So
each parameter of two axes or more is a layer, or is listed with the reason why it is none.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.errors import AutopruneError, ConfigError, did_you_mean, first_line
from autoprune.model.arguments import Arguments, call_with
from autoprune.model.copies import copy_for_inference, not_running, out_of_reach
from autoprune.model.recurrent.names import GATES
from autoprune.model.uses import Use, watch_weights
from autoprune.model.weights import first_names, kind_of, module_at, weight_of, weighted_layers
from autoprune.plan import LayerSpec

MIN_WEIGHTS = 64  # below this a layer's time is dispatch, and its zeros save nothing
_PRUNED = ("linear", "conv1d", "conv2d")  # kinds of products that are packed


@dataclass(frozen=True)
class KeptDense:
    """A layer that is not offered for pruning, and the reason shown to the user."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """What a model offers: `layers` in the order they first run, `dense` with a reason each."""

    layers: tuple[LayerSpec, ...]
    dense: tuple[KeptDense, ...]

    def __getitem__(self, name: str) -> LayerSpec:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        return {layer.name: layer for layer in self.layers}

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """A tensor or a tuple of them -> the tuple a model is called with."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


@contextmanager
def watch_forward(model: nn.Module, names: Iterable[str], seen: Any) -> Iterator[None]:
    """Calls ``seen(name, args, output)`` after each forward of the modules called `names`, without registering hooks.

    A hook would change the path that some modules take.
    """

    def watched(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen(name, args or tuple(kwargs.values()), output)
            return output

        return run

    modules = [(name, model.get_submodule(name)) for name in names]
    before = [(module, module.__dict__.get("forward")) for _, module in modules]
    try:
        for name, module in modules:
            module.forward = watched(name, module.forward)
        yield
    finally:
        for module, own in before:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def own_modes(*models: nn.Module) -> Iterator[None]:
    """Every module may be put in train or eval mode; afterwards it is in its own again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in its own again."""
    with own_modes(model):
        model.eval()
        yield


def record_inputs(model: nn.Module, example_inputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Runs `model` once and returns the first input of each named layer; layers never called are left out.

    That of a Linear or a convolution is what its forward is given, that of any other weight what is multiplied by it.
    """
    given: dict[str, Tensor] = {}
    multiplied: dict[str, Tensor] = {}
    modules = [name for name in weighted_layers(model) if name in names and module_at(model, name) is not None]

    def seen(name: str, args: tuple[Any, ...], _: Any) -> None:
        given.setdefault(name, args[0])

    def used(name: str, use: Use) -> None:
        multiplied.setdefault(name, use.x)

    with watch_forward(model, modules, seen), watch_weights(model, names, used), torch.inference_mode():
        call_with(model, example_inputs)
    return {**multiplied, **given}


def take_inventory(
    model: nn.Module, example_inputs: Any, *, keep_dense: Sequence[str] = (), min_weights: int = MIN_WEIGHTS
) -> Inventory:
    """Runs a copy of `model` once in eval mode and lists its prunable layers.

    Args:
        model: any module; it is left as it is.
        example_inputs: as the model is called; see `Arguments`.
        keep_dense: glob patterns of layer names never to prune.
        min_weights: layers with fewer weights stay dense.

    Raises:
        AutopruneError: when the model does not run on the inputs, or no layer can be pruned.
    """
    probe = copy_for_inference(model)
    norms = {name: module for name, module in probe.named_modules() if isinstance(module, _BatchNorm)}
    run = _run(probe, example_inputs, norms)
    first = first_names(probe)
    layers, dense, outside = [], [], out_of_reach(probe)
    for name in dict.fromkeys((*run.calls, *weighted_layers(probe), *first)):
        if any(name == each or name.startswith(f"{each}.") for each in outside):
            continue
        call = run.calls.get(name)
        kind = kind_of(probe, name) if call is None else _kind(probe, name, call)
        reason = _reason_to_keep(probe, name, run, keep_dense, min_weights)
        if first.get(name, name) != name:
            reason = f"its weight is that of {first[name]}, and is pruned where that is"
        if reason or call is None:
            dense.append(KeptDense(name, kind, reason or ""))
        else:
            norm = run.norms.get(name)
            whole = norm is not None and _normalises_filters(norms[norm], call)
            spec = _spec(name, kind, call, Arguments.of(example_inputs).samples)
            biases = _names_of(probe, call.biases)
            layers.append(replace(spec, biases=biases, norm=norm if whole else None))
    dense += [KeptDense(name, kind, why) for name, (kind, why) in outside.items()]
    if not layers:
        why = "; ".join(f"{row.name}: {row.reason}" for row in dense[:5]) or "no product reads a parameter of it"
        raise AutopruneError(f"no layer of this model can be pruned ({why}).")
    return Inventory(tuple(layers), tuple(dense))


def check_patterns(keep_dense: Sequence[str], inventory: Inventory) -> None:
    """Raises ConfigError where one of these glob patterns is no name of the model's: a slip would prune that layer."""
    names = [*inventory.names, *(row.name for row in inventory.dense)]
    if isinstance(keep_dense, str):
        raise ConfigError(f"keep_dense is a list of names or glob patterns, such as [{keep_dense!r}], not a string.")
    for pattern in keep_dense:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"keep_dense: no layer is called {pattern!r}. {did_you_mean(pattern, names)}")


@dataclass
class _Calls:
    """How a layer's weight was used: the first time, and in sum."""

    first: Use
    positions: int = 0
    calls: int = 0
    biases: list[Tensor] = field(default_factory=list)
    alike: bool = True  # every time in the same way

    def add(self, use: Use) -> None:
        self.positions += use.output.numel() // max(1, use.weight.shape[0])
        self.calls += 1
        if use.bias is not None and not any(bias is use.bias for bias in self.biases):
            self.biases.append(use.bias)
        same = (use.kind, use.turned, use.weight.shape, use.settings)
        self.alike &= same == (self.first.kind, self.first.turned, self.first.weight.shape, self.first.settings)


@dataclass(frozen=True)
class _Run:
    """What one run of the model showed.

    Attributes:
        calls: of each layer whose weight is multiplied by, in the order of the first ones.
        read_by: layer -> names of the functions that read its weight and are no such product.
        norms: layer -> batch norm behind it.
    """

    calls: Mapping[str, _Calls]
    read_by: Mapping[str, Sequence[str]]
    norms: Mapping[str, str]


def _run(probe: nn.Module, example_inputs: Any, norms: Mapping[str, nn.Module]) -> _Run:
    """Runs `probe` once, watched.

    Raises:
        AutopruneError: it does not run on the inputs.
    """
    calls: dict[str, _Calls] = {}
    read_by: dict[str, list[str]] = {}
    readings = _Readings()

    def used(name: str, use: Use) -> None:
        calls.setdefault(name, _Calls(use)).add(use)
        readings.written(name, use.output)

    def read(name: str, function: str) -> None:
        if function not in read_by.setdefault(name, []):
            read_by[name].append(function)

    def normed(name: str, args: tuple[Any, ...], _: Any) -> None:
        readings.read(name, args[0])

    try:
        # inference tensors have no version, whatever mode the caller is in
        watching = watch_forward(probe, norms, normed), watch_weights(probe, None, used, read)
        with watching[0], watching[1], torch.inference_mode(False), torch.no_grad():
            call_with(probe, example_inputs)
    except AttributeError as error:
        raise not_running(error) from error
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in Arguments.of(example_inputs).tensors)
        raise AutopruneError(
            f"the model does not run on its example inputs of shape {shapes}: "
            f"{first_line(error) or type(error).__name__}. Give inputs shaped as the model is called, batch included."
        ) from error
    return _Run(calls, read_by, readings.norms())


class _Readings:
    """Which batch norm reads which layer's output, before anything has changed it in place."""

    def __init__(self) -> None:
        self._outputs: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._writers: list[str] = []
        self._read: list[tuple[str, str | None]] = []  # norm, layer

    def written(self, layer: str, output: Tensor) -> None:
        self._writers.append(layer)
        self._outputs[id(output)] = (weakref.ref(output), output._version, layer)

    def read(self, norm: str, given: Tensor) -> None:
        output, version, layer = self._outputs.get(id(given), (None, 0, None))
        same = output is not None and output() is given and given._version == version
        self._read.append((norm, layer if same else None))

    def norms(self) -> Mapping[str, str]:
        """Layer -> norm, where both ran once."""
        ran = [norm for norm, _ in self._read]
        readers = [layer for _, layer in self._read]
        return {
            layer: norm
            for norm, layer in self._read
            if layer is not None and ran.count(norm) == readers.count(layer) == self._writers.count(layer) == 1
        }


def _normalises_filters(norm: nn.Module, call: _Calls) -> bool:
    """Whether an entry of `norm` is one filter's; in a Linear's output of three dimensions it is a position's."""
    flat = call.first.kind != "linear" or call.first.x.ndim == 2
    return flat and isinstance(norm.weight, Tensor) and len(norm.weight) == call.first.weight.shape[0]


def _names_of(model: nn.Module, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """The qualified names of those that are parameters."""
    return tuple(name for name, own in model.named_parameters() if any(own is each for each in tensors))


def _kind(model: nn.Module, name: str, call: _Calls) -> str:
    named = kind_of(model, name)
    return named if named in GATES else call.first.kind


def _reason_to_keep(model: nn.Module, name: str, run: _Run, keep_dense: Sequence[str], min_weights: int) -> str | None:
    if any(fnmatch.fnmatch(name, pattern) for pattern in keep_dense):
        return "the config keeps it dense"
    weight, call, module = weight_of(model, name), run.calls.get(name), module_at(model, name)
    if not isinstance(weight, nn.Parameter):
        return "its weight is no parameter, so that it cannot be trained"
    if call is None and kind_of(model, name) == "lstm":
        return "an LSTM with projections (proj_size) is not prunable: use one without, and a Linear behind it"
    if call is None:
        return _unused(run.read_by.get(name, ()))
    if weight.dtype != torch.float32:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    if not call.alike:
        return "it is used in more than one way"
    if call.first.kind not in _PRUNED:
        if call.first.kind == "conv3d":
            return "weights of its kind are not planned; a program packs a conv3d that has zeros"
        return f"no packed form is of its kind: {call.first.kind} runs in torch, zeros or not"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r} has no packed form"
    if call.first.settings.get("padding") == "same" and any(extent % 2 == 0 for extent in weight.shape[2:]):
        return "'same' padding of an even kernel has no packed form"
    if weight.numel() < min_weights:
        return f"only {weight.numel()} weights"
    return None


def _unused(functions: Sequence[str]) -> str:
    """Why a weight is no layer that nothing multiplies by as it is."""
    if not functions:
        return "the model does not read it on these inputs"
    return f"nothing multiplies by it as it is; what reads it: {', '.join(functions[:3])}"


def _spec(name: str, kind: str, call: _Calls, samples: int) -> LayerSpec:
    use = call.first
    window: dict[str, Any] = {}
    if kind in ("conv1d", "conv2d"):
        window = dict(zip(("stride", "padding", "dilation"), use.window[1:], strict=True))
    x = use.by_sample(use.x, max(1, samples))
    return LayerSpec(
        name=name, kind=kind, weight_shape=tuple(use.weight.shape), input_shape=tuple(x.shape),
        positions=call.positions, conv_groups=use.conv_groups, calls=call.calls, gates=GATES.get(kind, 1),
        turned=use.turned, **window,
    )  # fmt: skip
