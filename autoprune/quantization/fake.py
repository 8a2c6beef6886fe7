"""Fake quantisation: a model in training computes what its int8 layers will (Jacob et al. 2018).

A layer that will be int8 rounds what it reads to a grid, and its weight to a scale a filter; a module whose output is
kept as bytes rounds that. Gradients pass straight through, but not where a value lies beyond its grid (Bengio et al.
2013). Hooks do it: modules keep their classes, and parameters their names and exact values, so that optimizers, masks
and other hooks see what they always saw. The grids are buffers, and so in state dicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import Grid, weight_scales
from autoprune.quantization.ranges import on_scales

INPUT, OUTPUT = "int8_input", "int8_output"
"""Buffers, (scale, zero point): the grid of what an int8 layer reads, and of what a module gives."""


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_EXACT: ContextVar[bool] = ContextVar("exact", default=False)


def place_of(module: str, side: str) -> str:
    """Where a grid is in a state dict: that of a module, by name, and of what it reads (INPUT) or gives (OUTPUT)."""
    return f"{module}.{side}".lstrip(".")  # the model itself has no name


class _StraightThrough(torch.autograd.Function):
    """``rounding(x)``, with the gradient going to x; where there are bounds, only to what lies between them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor], bounds: tuple[float, float] | None
    ) -> Tensor:
        ctx.bounds = bounds
        if bounds is not None:
            ctx.save_for_backward(x)
        return rounding(x)  # a tensor made here: torch lets none that was made before be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if ctx.bounds is not None:  # one fused pass, several times faster than a mask
            gradient = torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.bounds)
        return gradient, None, None


def fake_quantized(x: Tensor, grid: Grid) -> Tensor:
    """X moved onto a grid, of x's shape and dtype; its gradient is 0 where that is further than a rounding."""
    bounds = grid.low - grid.scale / 2, grid.high + grid.scale / 2
    return _StraightThrough.apply(x, lambda x: grid.rounded(x.float()).to(x.dtype), bounds)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantized_weight(weight: Tensor) -> Tensor:
    """A weight moved onto the scale that each filter's largest magnitude gives it; cut weights stay 0."""
    return _StraightThrough.apply(weight, lambda exact: on_scales(exact, weight_scales(exact)), None)  # type: ignore[no-any-return, no-untyped-call]


class _Hiding(Tensor):
    """Hides a layer's weight while threads call it: what is computed of it is computed of the rounded weight.

    Each thread rounds for itself, with its own gradients, or takes the exact weight within `unrounded`.

    Attributes:
        exact: the weight.
        threads: which are in a call.
    """

    exact: Tensor
    threads: set[int]

    @classmethod
    def of(cls, weight: Tensor) -> _Hiding:
        """Of no call so far."""
        made = weight.detach().as_subclass(cls)
        made.exact, made.threads = weight, set()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def seen(x: Any) -> Any:
            if not isinstance(x, cls):
                return x
            return x.exact if _EXACT.get() else fake_quantized_weight(x.exact)

        args, kwargs = pytree.tree_map(seen, (args, kwargs or {}))
        return func(*args, **kwargs)


_HIDING = Lock()  # held where layers are given a `_Hiding`, or it is taken from them


@contextmanager
def unrounded() -> Iterator[None]:
    """Within it, fake-quantised models of this thread compute with their exact weights and values."""
    before = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(before)


def quantizable_module(module: nn.Module) -> bool:
    """Whether hooks can make a module compute as an int8 layer does: its weight is a plain parameter, filters first."""
    return isinstance(module, _LAYERS) and "weight" in module._parameters


def _exact_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a Conv1d, Conv2d or Linear; raises AutopruneError where that is computed of others."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise AutopruneError(
            f"the weight of a {type(module).__name__} is computed of others at each call, and fake quantisation "
            "rounds parameters alone: make it plain first (prune.remove, remove_parametrizations)."
        )
    return weight


def attach_(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Makes modules round.

    Args:
        model: changed in place; grids that it has already are replaced.
        grids: by place, ``<module>.int8_input`` or ``<module>.int8_output``, see `place_of`; an input's makes the
            weight int8, too.

    Raises:
        AutopruneError: the model has no such module, or an input's can be no int8 layer; the model is as before.
    """
    modules = {place: _module_at(model, place) for place in grids}
    for place, module in modules.items():
        side, grid = place.rpartition(".")[2], grids[place]
        some = next(iter(module.parameters()), None)
        held = torch.tensor([grid.scale, float(grid.zero_point)], device=None if some is None else some.device)
        hooked = side in module._buffers
        module.register_buffer(side, held)
        if hooked:
            continue
        if side == INPUT:
            module.register_forward_pre_hook(_before, with_kwargs=True)
            module.register_forward_hook(_after, always_call=True)
        else:
            module.register_forward_hook(_round_output)


def _module_at(model: nn.Module, place: str) -> nn.Module:
    name, _, side = place.rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AutopruneError(f"the model has no module {name!r}, whose grid was given.") from None
    if side == INPUT:
        if not isinstance(module, _LAYERS):
            raise AutopruneError(f"{name!r} is a {type(module).__name__} that cannot be fake-quantised.")
        _exact_weight(module)
    return module


def grids_in(state: Mapping[str, Tensor]) -> dict[str, Grid]:
    """The grids in a state dict, by place; empty of a model that is not fake-quantised."""
    return {name: _grid(held) for name, held in state.items() if name.rpartition(".")[2] in (INPUT, OUTPUT)}


def grids_of(model: nn.Module) -> dict[str, Grid]:
    """The grids of a fake-quantised model, by place; empty of any other."""
    return grids_in(dict(model.named_buffers()))


def check_plain(model: nn.Module) -> None:
    """Raises AutopruneError for a fake-quantised model."""
    if grids_of(model):
        raise AutopruneError("the model is fake-quantised: undo that first, with autoprune.dequantize_(model).")


def dequantize_(model: nn.Module, *, rounded: bool = False) -> nn.Module:
    """Undoes fake quantisation; a model without it is left as it is.

    Args:
        model: changed in place, and returned.
        rounded: whether the weights of int8 layers are left as those hold them, in place of the exact ones. A layer
            that shares its weight with another module gets one of its own.

    Raises:
        AutopruneError: a weight is to be rounded that is computed of others.
    """
    if rounded:
        _round_weights_(model)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # which is never fake-quantised, and has no dictionaries of its own
        for side in (INPUT, OUTPUT):
            module._buffers.pop(side, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_before, _after, _round_output)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return model


def _round_weights_(model: nn.Module) -> None:
    layers = [(module, _exact_weight(module)) for module in model.modules() if INPUT in module._buffers]
    held = Counter(id(x) for module in model.modules() for x in module._parameters.values())
    with torch.no_grad():
        for module, weight in layers:
            rounded = fake_quantized_weight(weight)
            if held[id(weight)] > 1:
                module._parameters["weight"] = nn.Parameter(rounded, weight.requires_grad)
            else:
                weight.copy_(rounded)


def _grid(held: Tensor) -> Grid:
    scale, zero_point = held.tolist()
    return Grid(scale, int(zero_point))


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the layer reads; its parameter is hidden during the call."""
    if _EXACT.get():
        return args, kwargs
    grid, weight = _grid(module._buffers[INPUT]), _exact_weight(module)  # type: ignore[arg-type]
    if args:
        args = (fake_quantized(args[0], grid), *args[1:])
    else:
        kwargs = {**kwargs, "input": fake_quantized(kwargs["input"], grid)}
    with _HIDING:
        hiding = vars(module).setdefault("weight", _Hiding.of(weight))
        hiding.exact = weight  # an interrupted call may have left it, and the layer been given another one since
        hiding.threads.add(get_ident())
    return args, kwargs


def _after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The parameter is seen again when the last thread leaves, even where the call failed, or before it began."""
    with _HIDING:
        hiding = vars(module).get("weight")
        if isinstance(hiding, _Hiding):
            hiding.threads.discard(get_ident())
            if not hiding.threads:
                del vars(module)["weight"]


def _round_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    if _EXACT.get():
        return output
    return fake_quantized(output, _grid(module._buffers[OUTPUT]))  # type: ignore[arg-type]
