"""Models with fewer channels than their code makes: which modules may have them, and a model cut to given tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from autoprune.errors import AutopruneError, FileError
from autoprune.files import given_path, read_state
from autoprune.model.copies import check_weights, deep_copy

_SHOWN = 3  # faults that an error names


def load_shrunk(model: nn.Module, path: Path | str) -> nn.Module:
    """The smaller model whose state dict a safetensors file holds, as `shrink` made it and others trained it on.

    Args:
        model: of the full size, as the code makes it; left as it is. Its weights do not matter.
        path: of the file, written by ``safetensors.torch.save_file(small.state_dict(), path)`` or `autoprune shrink`.

    Returns:
        A copy of `model` that is cut to the shapes in the file, with its weights.

    Raises:
        FileError: the file cannot be read, or does not fit the model: another name, another type, or a shape that the
            model's modules cannot be cut to.
        AutopruneError: the model has weights without values, or cannot be copied.
    """
    check_weights(model)
    small, file = deep_copy(model), given_path(path)
    tensors = read_state(file, "the shrunk model")
    try:
        resize_(small, tensors)
    except AutopruneError as error:
        raise FileError(f"{file} does not fit the model: {error}") from None
    return small


def resize_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Cuts a model to the shapes of a state dict and loads it; changes nothing where it does not fit.

    A convolution or Linear without a bias gets one where the state dict has it. Of the names of one parameter, one is
    enough.

    Raises:
        AutopruneError: it does not fit; says what was given and what is allowed.
    """
    held = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    given = {id(held[name]) for name in tensors if name in held}
    whole, parts = obstacles(model), _by_module(tensors)
    faults = [f"it has no {name}" for name, x in held.items() if name not in tensors and id(x) not in given]
    for name, x in tensors.items():
        path, _, role = name.rpartition(".")
        if name not in held and not (role == "bias" and path in whole and _lacks_bias(model.get_submodule(path))):
            faults.append(f"it has a {name}, and the model has none")
        elif fault := _unlike(x, held.get(name), whole.get(path, "")):
            faults.append(f"{name} {fault}")
    resized = [
        path
        for path, own in parts.items()
        if any(name not in held or held[name].shape != x.shape for name, x in _named(own, path).items())
    ]
    for path in resized:
        if len({len(x) for x in parts[path].values() if x.ndim}) > 1:
            faults.append(f"the tensors of {path} differ in length")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise AutopruneError("; ".join(faults[:_SHOWN]) + more + ".")
    for path in resized:
        _put_(model.get_submodule(path), parts[path])
    model.load_state_dict(dict(tensors), strict=False)


def obstacles(model: nn.Module) -> dict[str, str]:
    """Each module with tensors of its own, by qualified name -> why its channels stay; empty where they can be cut."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        path: _obstacle(module, names)
        for path, module in model.named_modules()
        if any(x is not None for x in (*module._parameters.values(), *module._buffers.values()))
    }


def _obstacle(module: nn.Module, names: Mapping[int, list[str]]) -> str:
    parameters = [each for each in module._parameters.values() if each is not None]
    computed = isinstance(module, tuple(_SIZES)) and "weight" not in module._parameters
    if computed or parametrize.is_parametrized(module):
        return "its weight is computed of others at each call: make it plain (prune.remove, remove_parametrizations)"
    if type(module) not in _SIZES:
        return f"it is a {type(module).__name__}, which is not cut"
    if module._forward_hooks or module._forward_pre_hooks or any(each._backward_hooks for each in parameters):
        return "it has hooks"
    if shared := next((names[id(each)] for each in parameters if len(names[id(each)]) > 1), None):
        return f"one parameter is {' and '.join(shared)}"
    groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1
    if groups > 1 and not groups == module.in_channels == module.out_channels:
        return f"it has {groups} groups of channels"
    return ""


def _linear_(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _convolution_(module: Any) -> None:
    filters, columns = module.weight.shape[:2]
    module.groups = filters if module.groups > 1 else 1
    module.out_channels, module.in_channels = filters, columns * module.groups


def _norm_(module: Any) -> None:
    module.num_features = len(module.weight if module.running_mean is None else module.running_mean)


# What is cut, these very classes: a subclass may compute something else -> sets its sizes by its weights.
_SIZES: Mapping[type[nn.Module], Callable[[Any], None]] = {
    nn.Conv1d: _convolution_,
    nn.Conv2d: _convolution_,
    nn.Linear: _linear_,
    nn.BatchNorm1d: _norm_,
    nn.BatchNorm2d: _norm_,
}


def _put_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the places of a module's own, each of the same device and trained or not as before."""
    like: Any = next(x for x in (module._parameters["weight"], *module._buffers.values()) if x is not None)
    for role, value in tensors.items():
        value = value.detach().to(like.device).clone()
        if role in module._buffers:
            module._buffers[role] = value
        else:
            old = module._parameters[role]
            module._parameters[role] = nn.Parameter(value, (like if old is None else old).requires_grad)
    _SIZES[type(module)](module)


def _lacks_bias(module: nn.Module) -> bool:
    return type(module) in _SIZES and not isinstance(module, nn.modules.batchnorm._BatchNorm) and module.bias is None


def _unlike(x: Tensor, held: Tensor | None, whole: str) -> str:
    """What is wrong with a tensor in the place of the model's own; empty where nothing is."""
    if held is None:
        return whole and f"is new, and its module cannot be changed: {whole}"
    if x.dtype != held.dtype:
        return f"is of {x.dtype}, the model's of {held.dtype}"
    if x.shape == held.shape:
        return ""
    shapes = f"has the shape {tuple(x.shape)}, the model's {tuple(held.shape)}"
    if whole:
        return f"{shapes}, which stays: {whole}"
    fewer = all(1 <= a <= b for a, b in zip(x.shape[:2], held.shape[:2], strict=False))
    fits = fewer and x.ndim == held.ndim and x.shape[2:] == held.shape[2:]
    return "" if fits else f"{shapes}; along the first two axes there may be fewer"


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Qualified name of a module -> its own tensors, by their names in it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        path, _, role = name.rpartition(".")
        found.setdefault(path, {})[role] = x
    return found


def _named(own: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    return {f"{path}.{role}".lstrip("."): x for role, x in own.items()}
