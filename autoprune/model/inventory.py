"""Model + example inputs -> which layers can be pruned, and which stay dense and why.

The model is run once and every candidate's `forward` is watched without hooks (a hook would change the
path some modules take), so a layer whose weight is read behind its back is found out, not guessed.
"""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.errors import AutopruneError, first_line
from autoprune.model.arguments import Arguments, call_with
from autoprune.model.copies import copy_for_inference, not_running, out_of_reach
from autoprune.model.recurrent.modules import run_stepwise
from autoprune.model.recurrent.names import GATES, cell_of, layer_at, layers_of, split_name
from autoprune.plan import LayerSpec

MIN_WEIGHTS = 64  # below this a layer's time is dispatch, and its zeros save nothing


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


@dataclass
class _Call:
    input_shape: tuple[int, ...]
    positions: int
    calls: int = 1


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """A tensor or a tuple of them -> the tuple a model is called with."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a kind this library can prune, by qualified name; the first name of a shared one.

    Each weight of an LSTM or GRU is a layer, under its own name: a Linear that shares it.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers[name] = module
        elif cell_of(module) is not None:
            layers |= {f"{name}.{own}".lstrip("."): layer for own, layer in layers_of(module).items()}
        elif isinstance(module, nn.LSTM):
            layers[name] = module  # with projections: only to say that it stays as it is
    return layers


@contextmanager
def watch_forward(model: nn.Module, names: Iterable[str], seen: Any) -> Iterator[None]:
    """Calls ``seen(name, args, output)`` after each forward of the layers called `names`, without registering hooks.

    A recurrent module one of whose weights is named runs a step at a time, so that each use of the weight is seen.
    """

    def watched(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen(name, args or tuple(kwargs.values()), output)
            return output

        return run

    def stepwise(path: str, module: Any, weights: frozenset[str]) -> Any:
        def call(weight: str, x: Tensor) -> Tensor:
            output: Tensor = layer_at(module, weight)(x)
            if weight in weights:
                seen(f"{path}.{weight}".lstrip("."), (x,), output)
            return output

        return lambda x, hx=None: run_stepwise(module, x, hx, call)

    forwards: dict[nn.Module, Any] = {}
    recurrent: dict[str, set[str]] = {}
    for name in names:
        place = split_name(name)
        if place is not None and cell_of(model.get_submodule(place[0])) is not None:
            recurrent.setdefault(place[0], set()).add(place[1])
        else:
            module = model.get_submodule(name)
            forwards[module] = watched(name, module.forward)
    for path, weights in recurrent.items():
        module = model.get_submodule(path)
        forwards[module] = stepwise(path, module, frozenset(weights))
    before = [(module, module.__dict__.get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.forward = forward
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
    """Runs `model` once and returns the first input of each named layer; layers never called are left out."""
    inputs: dict[str, Tensor] = {}
    wanted = weighted_layers(model).keys() & set(names)

    def seen(name: str, args: tuple[Any, ...], _: Any) -> None:
        inputs.setdefault(name, args[0])

    with watch_forward(model, wanted, seen), torch.inference_mode():
        call_with(model, example_inputs)
    return inputs


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
    candidates = weighted_layers(probe)
    norms = {name: module for name, module in probe.named_modules() if isinstance(module, _BatchNorm)}
    calls, of_layers = _watch_calls(probe, example_inputs, candidates, norms)
    owners = _weight_owners(probe)
    layers, dense = [], []
    order = list(calls) + [name for name in candidates if name not in calls]
    for name in order:
        module = candidates[name]
        kind = kind_of(probe, name, module)
        reason = _reason_to_keep(name, module, calls.get(name), owners, keep_dense, min_weights)
        if reason:
            dense.append(KeptDense(name, kind, reason))
        else:
            norm = of_layers.get(name)
            whole = norm is not None and _normalises_filters(norms[norm], module, calls[name])
            layers.append(_spec(name, kind, module, calls[name], norm if whole else None))
    dense += [KeptDense(name, kind, why) for name, (kind, why) in out_of_reach(probe).items()]
    if not layers:
        why = (
            "; ".join(f"{row.name}: {row.reason}" for row in dense[:5]) or "it has no Conv2d, Linear, LSTM or GRU layer"
        )
        raise AutopruneError(f"no layer of this model can be pruned ({why}).")
    return Inventory(tuple(layers), tuple(dense))


def _watch_calls(
    probe: nn.Module, example_inputs: Any, candidates: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> tuple[dict[str, _Call], Mapping[str, str]]:
    """Runs `probe` once: how each layer was called, in the order of the first calls, and layer -> batch norm behind it.

    Raises:
        AutopruneError: it does not run on the inputs.
    """
    calls: dict[str, _Call] = {}
    readings = _Readings()

    def seen(name: str, args: tuple[Any, ...], output: Any) -> None:
        if name in norms:
            readings.read(name, args[0])
            return
        if isinstance(output, Tensor):
            readings.written(name, output)
        tensor = output[0] if isinstance(output, tuple) else output
        channels = tensor.shape[1] if isinstance(candidates[name], nn.Conv2d) else tensor.shape[-1]
        positions = tensor.numel() // max(1, channels)
        if name in calls:
            calls[name].positions += positions
            calls[name].calls += 1
        else:
            calls[name] = _Call(tuple(args[0].shape), positions)

    try:
        # inference tensors have no version, whatever mode the caller is in
        with watch_forward(probe, [*candidates, *norms], seen), torch.inference_mode(False), torch.no_grad():
            call_with(probe, example_inputs)
    except AttributeError as error:
        raise not_running(error) from error
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in Arguments.of(example_inputs).tensors)
        raise AutopruneError(
            f"the model does not run on its example inputs of shape {shapes}: "
            f"{first_line(error) or type(error).__name__}. Give inputs shaped as the model is called, batch included."
        ) from error
    return calls, readings.norms()


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


def _normalises_filters(norm: nn.Module, layer: nn.Module, call: _Call) -> bool:
    """Whether an entry of `norm` is one filter's; in a Linear's output of three dimensions it is a position's."""
    weight = cast("Tensor", layer.weight)
    flat = isinstance(layer, nn.Conv2d) or len(call.input_shape) == 2
    return flat and isinstance(norm.weight, Tensor) and len(norm.weight) == len(weight)


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _reason_to_keep(
    name: str,
    module: nn.Module,
    call: _Call | None,
    owners: dict[int, list[str]],
    keep_dense: Sequence[str],
    min_weights: int,
) -> str | None:
    if any(fnmatch.fnmatch(name, pattern) for pattern in keep_dense):
        return "the config keeps it dense"
    if isinstance(module, nn.LSTM):
        return "an LSTM with projections (proj_size) is not prunable: use one without, and a Linear behind it"
    if call is None:
        return "its forward never ran: the model reads its weight directly, or does not use it"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is no parameter, so that it cannot be trained"
    if weight.dtype != torch.float32:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    if len(owners.get(id(weight), [])) > 1:
        return f"its weight is shared with {', '.join(o for o in owners[id(weight)] if o != name + '.weight')}"
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            return f"padding mode {module.padding_mode!r} has no packed form"
        if isinstance(module.padding, str) and module.padding == "same" and any(s % 2 == 0 for s in module.kernel_size):
            return "'same' padding of an even kernel has no packed form"
    if math.prod(weight.shape) < min_weights:
        return f"only {math.prod(weight.shape)} weights"
    return None


def conv_padding(module: nn.Conv2d) -> tuple[int, int]:
    """The zero rows and columns added on each side, for numeric and string paddings alike."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        high, wide = (d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return (high, wide)
    return (int(module.padding[0]), int(module.padding[1]))


def kind_of(model: nn.Module, name: str, module: nn.Module) -> str:
    """What the layer `module`, called `name` in `model`, is: ``conv2d``, ``linear``, ``lstm`` or ``gru``."""
    place = split_name(name)
    cell = None if place is None else cell_of(model.get_submodule(place[0]))
    return cell or type(module).__name__.lower()


def _spec(name: str, kind: str, module: nn.Module, call: _Call, norm: str | None) -> LayerSpec:
    common = {"name": name, "input_shape": call.input_shape, "positions": call.positions, "calls": call.calls}
    common["norm"] = norm
    if isinstance(module, nn.Conv2d):
        return LayerSpec(
            kind=kind,
            weight_shape=tuple(module.weight.shape),
            conv_groups=module.groups,
            stride=(module.stride[0], module.stride[1]),
            padding=conv_padding(module),
            dilation=(module.dilation[0], module.dilation[1]),
            **common,  # type: ignore[arg-type]
        )
    assert isinstance(module, nn.Linear)
    gates = GATES.get(kind, 1)
    return LayerSpec(kind=kind, weight_shape=tuple(module.weight.shape), gates=gates, **common)  # type: ignore[arg-type]
