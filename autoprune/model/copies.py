"""Copies of models and tensors to work on: in eval mode, with plain weights, and sharing nothing with the original."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autoprune.errors import AutopruneError
from autoprune.model.fast_paths import unfuse_

_PARTS = re.compile(r"'(parametrizations|\w+_(orig|mask|g|v|u))'$")  # attributes that `settle_` takes away


def own_copy(x: Tensor) -> Tensor:
    """The same values as a plain tensor that shares nothing: of its own memory, whose bits are what it holds.

    What has no such memory, a sparse tensor for example, is given back as it is.
    """
    if not has_memory(x):
        return x
    with torch.inference_mode(False):
        plain = x.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        return plain.clone(memory_format=torch.contiguous_format)


def has_memory(x: object) -> TypeGuard[Tensor]:
    """Whether it is a dense tensor with memory of its own: a subclass may be made of others instead, or of none."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        return False
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def check_weights(model: nn.Module) -> None:
    """Raises AutopruneError for a model that has no weights yet."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise AutopruneError(f"{name} has no shape yet: call the model once, so that its lazy modules are made.")
        if value.is_meta:
            raise AutopruneError(f"{name} is on the meta device and has no values: load the model's weights first.")


def check_inputs(tensors: Iterable[Tensor], dense: bool = False) -> None:
    """Raises AutopruneError for inputs that nothing here runs a model on; `dense`: for all but dense tensors."""
    for x in tensors:
        if x.layout is torch.jagged or (dense and not has_memory(x)):
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise AutopruneError(
                f"an input is a {kind} tensor ({type(x).__name__}): give a dense one, such as "
                "torch.nested.to_padded_tensor(x, 0.0) or x.to_dense(), to a model that takes it."
            )


def uncompiled_(model: nn.Module) -> nn.Module:
    """The model with what `torch.compile` was given in the places of what it made of that, ``_orig_mod`` in no name."""
    for name, module in list(model.named_modules()):
        given = dict(module.named_children()).get("_orig_mod")
        if given is not None and not name:
            return uncompiled_(given)
        if given is not None:
            model.set_submodule(name.replace("_orig_mod.", ""), given)
    return model


def not_running(error: Exception) -> AutopruneError:
    """What to say of a model that raised `error` when it was called with its example inputs."""
    if isinstance(error, AttributeError) and _PARTS.search(str(error)):
        return AutopruneError(
            f"the model's forward reads what a weight is computed of ({error}), and for inference there is the weight "
            "alone: read that, e.g. self.layer.weight."
        )
    return AutopruneError(f"the model does not run on its example inputs: {error}")


def copy_for_inference(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose submodules' forwards are really called and whose weights are plain.

    Raises:
        AutopruneError: it is no module, or TorchScript as a whole, or has weights without values, or cannot be copied.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        scripted = isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction))
        what = "TorchScript, whose layers cannot be seen" if scripted else f"a {type(model).__name__}"
        raise AutopruneError(f"the model is {what}: give the torch.nn.Module that it was made of.")
    check_weights(model)
    return unfuse_(settle_(deep_copy(model).eval()))


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model; raises AutopruneError where it holds what cannot be copied."""
    # torch refuses to copy a tensor that was computed, such as the product of a weight and its mask.
    attributes = (value for module in model.modules() for value in vars(module).values())
    computed = {id(x): x.detach().clone() for x in attributes if isinstance(x, Tensor) and not x.is_leaf}
    try:
        with torch.no_grad():  # TorchScript copies its parameters by an operator, with gradients if there are any
            copied = copy.deepcopy(model, cast("dict[int, Any]", computed))
    except Exception as error:  # what the model holds is the user's
        raise AutopruneError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and the original is never changed: it must "
            "hold dense tensors, and only what copy.deepcopy takes."
        ) from error
    return copied


def settle_(model: nn.Module) -> nn.Module:
    """Makes every weight a plain parameter: other tools keep a mask beside it and multiply at each call.

    Covers ``torch.nn.utils.prune`` and ``torch.nn.utils.parametrize``, and the older hooks of weight and spectral norm.
    """
    for module in model.modules():
        held = {name for name, _ in module.named_parameters(recurse=False)}
        for name in [name.removesuffix("_mask") for name, _ in module.named_buffers(recurse=False)]:
            if f"{name}_orig" in held and prune.is_pruned(module):
                prune.remove(module, name)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            parts = cast("nn.ModuleDict", module.parametrizations)
            trained = {name: any(x.requires_grad for x in part.parameters()) for name, part in parts.items()}
            names = list(parts)
            values = {name: getattr(module, name).detach().clone() for name in names}
            # Not remove_parametrizations: it changes the class, which copies of the module share.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=trained[name]))
    return model


def out_of_reach(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The outermost parts whose layers cannot be seen: qualified name -> (kind, why)."""
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in found):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            found[name] = ("torchscript", "it is TorchScript: put the module that it was made of in its place")
        elif type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            found[name] = (type(module).__name__.lower(), "it is quantised by torch: prune and repack it in float32")
    return found
