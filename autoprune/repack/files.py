"""The packed file: one safetensors file, its description as JSON in the metadata; smaller as sparsity grows.

Packed layers are stored by their packed weight whatever their backend, everything else as in a state dict. A file is
data: loading one runs no code of the file's, and every index is checked before native code sees it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.files import read_tensors, write_tensors
from autoprune.inventory import copy_for_inference
from autoprune.repack.backends import BACKENDS, LayerForm
from autoprune.repack.formats import PackedWeight
from autoprune.repack.report import DENSE, LayerReport, SwappedModel
from autoprune.repack.swap import with_submodule

FILE_VERSION = 1
_INTEGERS = (torch.uint8, torch.int16, torch.int32)
_ARRAYS = ("group_pointer", "index", "out_index")


def save_packed(model: SwappedModel, path: Path) -> None:
    """Writes a repacked model; `load_packed` needs the original architecture, not its weights."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, relu in model.relus.items():
        module: Any = model.model.get_submodule(name)
        packed: PackedWeight = module.packed
        layers[name] = {
            "shape": list(packed.shape),
            "conv_groups": packed.conv_groups,
            "group_size": packed.group_size,
            "relu": relu,
        }
        for field in _ARRAYS:
            tensors[f"{name}|{field}"] = _narrow(torch.from_numpy(getattr(packed, field)))
        tensors[f"{name}|values"] = torch.from_numpy(packed.values)
        if module.bias is not None:
            tensors[f"{name}|bias"] = module.bias
    inside = tuple(f"{name}." if name else "" for name in layers)
    for key, value in model.model.state_dict().items():
        if not (inside and key.startswith(inside)):
            tensors[key] = value
    about = {
        "version": FILE_VERSION,
        "layers": layers,
        "removed": list(model.removed),
        "report": [vars(row) for row in model.report],
        "checksums": {key: _checksum(value) for key, value in tensors.items()},
    }
    write_tensors(path, tensors, {"autoprune": json.dumps(about, sort_keys=True)})


def load_packed(path: Path, model: nn.Module) -> SwappedModel:
    """Reads a repacked model.

    Args:
        path: a file of `save_packed`.
        model: the original architecture, freshly built; its weights do not matter and it is left as it is.

    Raises:
        FileError: the file is missing, corrupt, of another version, or of another model.
    """
    tensors, metadata = read_tensors(path, "the packed model")
    try:
        return _assembled(tensors, json.loads(metadata["autoprune"]), copy_for_inference(model))
    except FileError as error:
        raise FileError(f"the packed model is corrupt: {path} ({error})") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, AutopruneError) as error:
        told = str(error).splitlines()[0] if str(error) else ""
        raise FileError(
            f"the packed model {path} is corrupt, or was made of another model ({type(error).__name__}: {told}). "
            "Repack again, or give the model it was made of."
        ) from None


def _assembled(tensors: dict[str, Tensor], about: Any, model: nn.Module) -> SwappedModel:
    if about["version"] != FILE_VERSION:
        raise FileError(f"this release reads version {FILE_VERSION}, not {about['version']!r}")
    if set(tensors) != set(about["checksums"]):
        raise FileError("its list of tensors does not match")
    for key, value in tensors.items():
        if _checksum(value) != about["checksums"][key]:
            raise FileError(f"the checksum of {key} does not match")
    report = [LayerReport(**row) for row in about["report"]]
    chosen = {row.name: row.backend for row in report}
    for name in about["removed"]:
        if not isinstance(model.get_submodule(name), (nn.BatchNorm2d, nn.ReLU)):
            raise FileError(f"{name!r} is no batch norm or ReLU in this model")
        model = with_submodule(model, name, nn.Identity())
    relus: dict[str, bool] = {}
    for name, layer in about["layers"].items():
        relus[name] = _flag(layer["relu"])
        lowered = _lowered(name, layer, tensors, model, chosen[name])
        model = with_submodule(model, name, lowered)
    rest = {key: value for key, value in tensors.items() if "|" not in key}
    _load_rest(model, rest, tuple(f"{name}." if name else "" for name in relus))
    return SwappedModel(model, report, relus, about["removed"])


def _lowered(name: str, layer: Any, tensors: dict[str, Tensor], model: nn.Module, backend: str) -> nn.Module:
    """Rebuilds one packed layer: arrays validated, shapes compared with the model's own layer."""
    module = model.get_submodule(name)
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or backend == DENSE:
        raise FileError(f"{name!r} is no layer that can be packed in this model")
    arrays = [_widen(tensors[f"{name}|{field}"], field) for field in _ARRAYS]
    values = tensors[f"{name}|values"]
    if values.dtype != torch.float32:
        raise FileError(f"the values of {name} are {values.dtype}")
    shape = tuple(_integer(extent) for extent in layer["shape"])
    packed = PackedWeight(
        shape,
        _integer(layer["conv_groups"]),
        _integer(layer["group_size"]),
        arrays[0],
        arrays[1],
        values.numpy(),
        arrays[2],
    ).validate()
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    if shape != tuple(module.weight.shape) or packed.conv_groups != groups:
        raise FileError(f"{name} has shape {shape}, the model's has {tuple(module.weight.shape)}")
    bias = tensors.get(f"{name}|bias")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != shape[:1]):
        raise FileError(f"the bias of {name} has shape {tuple(bias.shape)}")
    module.weight = nn.Parameter(packed.unpack(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    form = LayerForm(module, _flag(layer["relu"]))
    support = BACKENDS.get(backend)().supports(form)
    if not support.ok:
        raise AutopruneError(f"{name} was packed for backend {backend!r}, which cannot run here: {support.why}")
    return BACKENDS.get(backend)().lower(form)


def _load_rest(model: nn.Module, rest: dict[str, Tensor], packed: tuple[str, ...]) -> None:
    for name, module in model.named_modules():  # a folded batch norm gives a convolution a bias
        if isinstance(module, nn.Conv2d) and module.bias is None and f"{name}.bias" in rest:
            module.bias = nn.Parameter(torch.zeros(module.out_channels), requires_grad=False)
    expected = {key for key in model.state_dict() if not (packed and key.startswith(packed))}
    if expected != set(rest):
        raise FileError(f"it has other parameters than the model: {sorted(expected ^ set(rest))[:3]}")
    for key, value in model.state_dict().items():
        if key in rest and (rest[key].shape != value.shape or rest[key].dtype != value.dtype):
            raise FileError(f"{key} has shape {tuple(rest[key].shape)}, the model's has {tuple(value.shape)}")
    model.load_state_dict(rest, strict=False)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise FileError(f"a flag is {value!r}")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:  # JSON holds true, 1.5 and Infinity too
        raise FileError(f"an integer is {value!r}")
    return value


def _narrow(values: Tensor) -> Tensor:
    """The smallest integer type that holds the values; -1 is kept."""
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    fits = (dtype for dtype in _INTEGERS if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)
    return values.to(next(fits))


def _widen(values: Tensor, field: str) -> Any:
    if values.dtype not in _INTEGERS:
        raise FileError(f"{field} is {values.dtype}")
    return np.ascontiguousarray(values.to(torch.int32).numpy())


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
