"""Fingerprints: short texts that are equal in every process for what is the same, and differ for what is not.

Content counts: numbers, tensors, code, and what code reads. Where an object lives in memory, in which order a set gives
its members, the names of files and the numbers of lines do not. What Python's standard library and installed packages
define is known by its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autoprune.identity.code import (
    function_of,
    installed,
    installed_class,
    is_code,
    is_own,
    mentioned,
    read_by,
    wraps,
)

LONGEST = 2_000  # entries of a list that are read one by one; of a longer one, its length and as many from either end
DEEPEST = 40  # containers and objects within each other
_MAPPED = 2**24  # bytes read of an array that is a file
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def digest(*parts: str | bytes | memoryview) -> str:
    """A text of fixed length that tells `parts` from any others."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(f"{len(raw)}:".encode())
        sha.update(raw)
    return sha.hexdigest()[:24]


def tensor_fingerprint(tensor: Tensor) -> str:
    """Of its type, shape and values."""
    tensor = tensor.detach()
    kind = f"{tensor.dtype} {tensor.layout}"
    if tensor.is_nested:
        return digest(kind, *(tensor_fingerprint(part) for part in tensor.unbind()))
    shape = str(tuple(tensor.shape))
    if tensor.is_meta:
        return digest("meta", kind, shape)
    plain = tensor.dequantize() if tensor.is_quantized else tensor
    plain = plain if plain.layout is torch.strided else plain.to_dense()
    values = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return digest(kind, shape, values.numpy().data)


def weights_fingerprint(tensors: Mapping[str, Any]) -> str:
    """Of a whole state dict."""
    walk = _Walk()
    return digest(*(part for name, value in sorted(tensors.items()) for part in (name, walk(value))))


def model_fingerprints(model: nn.Module) -> dict[str, dict[str, str]]:
    """Of a model's weights and buffers by name, and of what each of its modules is and does with them."""
    return _Walk().model(model)


def architecture_fingerprint(model: nn.Module) -> str:
    """Of what a model computes, whatever its weights."""
    return digest(*(part for item in _Walk().model(model)["architecture"].items() for part in item))


def function_fingerprints(function: Any) -> dict[str, str]:
    """Of a function's code, and of each thing that it reads: closures, globals, attributes, and those of its helpers.

    Args:
        function: or any object that is called like one.
    """
    return dict(_Walk().pieces(function, ""))


def fingerprint(value: Any) -> str:
    """Of any value; an object that is nobody's own, such as a file or a lock, is known by its type."""
    return _Walk()(value)


class _Walk:
    """One walk over values, each read once: what contains itself is not followed again."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._known: dict[int, tuple[Any, str]] = {}  # the value is kept, or its id would be given to another

    def __call__(self, value: Any) -> str:
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._open or len(self._open) > DEEPEST:
            return "..."
        self._open.add(id(value))
        try:
            found = self._read(value)
        finally:
            self._open.discard(id(value))
        self._known[id(value)] = (value, found)
        return found

    def _read(self, value: Any) -> str:
        kind = _name(type(value))
        if isinstance(value, enum.Enum):
            return digest(kind, value.name)
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic, torch.Size)):
            return digest(kind, repr(value))
        if isinstance(value, (torch.dtype, torch.device, slice, range, types.EllipsisType)):
            return digest(kind, str(value))
        if isinstance(value, PurePath):
            return digest("path", value.name)  # where it lies is not what it is
        if isinstance(value, Tensor):
            return tensor_fingerprint(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, nn.Module):
            parts = self.model(value)
            return digest(*(text for pieces in parts.values() for item in pieces.items() for text in item))
        if isinstance(value, types.ModuleType):
            return digest("module", value.__name__)
        if is_code(value):
            return digest(*(text for piece in self.pieces(value, "") for text in piece))
        return self._contents(value, kind)

    def _contents(self, value: Any, kind: str) -> str:
        if isinstance(value, (set, frozenset)):
            return digest(kind, *sorted(map(self, value)))  # their order depends on the hash seed
        if isinstance(value, Mapping):
            entries = _ends(list(value.items()))
            return digest(kind, str(len(value)), *sorted(digest(self(key), self(each)) for key, each in entries))
        if isinstance(value, (list, tuple)):
            return digest(kind, str(len(value)), *map(self, _ends(value)))
        if isinstance(value, DataLoader):
            return digest(kind, self(value.dataset), self(value.batch_size), self(value.drop_last))
        if isinstance(value, (Dataset, argparse.Namespace, types.SimpleNamespace)) or is_own(value):
            state = {name: self(each) for name, each in _state(value).items()}
            return digest(self._class(type(value)), *(text for item in sorted(state.items()) for text in item))
        return kind

    def _array(self, value: np.ndarray[Any, Any]) -> str:
        kind = f"{value.dtype} {value.shape}"
        if value.dtype.hasobject:
            return digest(kind, self(value.tolist()))
        if isinstance(value, np.memmap):
            value = value.reshape(-1)[: max(1, _MAPPED // max(1, value.itemsize))]
        return digest(kind, np.ascontiguousarray(value).tobytes())

    def _code(self, code: types.CodeType) -> str:
        taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        constants = map(self, code.co_consts)
        return digest(code.co_code, code.co_exceptiontable, repr(code.co_names), repr(taken), *constants)

    def _class(self, kind: type) -> str:
        """A class by its name and, where it is not an installed package's, its methods and the values they name.

        What ``__init__`` does is seen in its objects.
        """
        parts, named = [kind.__qualname__], mentioned(kind)
        for base in kind.__mro__:
            own = not installed_class(base)
            for name, value in vars(base).items():
                function = function_of(value)
                if function is not None:
                    parts += [name, self(function)] if name != "__init__" and not installed(function) else []
                elif own and name in named and not name.startswith("__"):
                    parts += [name, self(value)]
        return digest(*parts)

    def model(self, model: nn.Module) -> dict[str, dict[str, str]]:
        first: dict[int, tuple[str, str]] = {}  # tensor -> the name it is first known by, and what it is

        def tensors(named: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
            found = {}
            for name, value in named:
                if id(value) not in first:
                    first[id(value)] = name, self(value)
                found[name] = digest(*first[id(value)], str(value.requires_grad))  # what is shared stays so
                self._known[id(value)] = value, digest("a tensor of the model", first[id(value)][0])  # from here on
            return found

        return {
            "weights": tensors(model.named_parameters(remove_duplicate=False)),
            "buffers": tensors(model.named_buffers(remove_duplicate=False)),
            "architecture": {name or "as a whole": self._module(module) for name, module in model.named_modules()},
        }

    def _module(self, module: nn.Module) -> str:
        """Its class, and those of its attributes that a method of it names: what is merely noted down changes nothing.

        Submodules and tensors under names of their own are read by themselves.
        """
        if isinstance(module, torch.jit.ScriptModule):
            return digest(module.original_name, re.sub(r"___torch_mangle_\d+", "", str(getattr(module, "code", ""))))
        named = mentioned(type(module))
        state = {
            name: self(value)
            for name, value in vars(module).items()
            if name not in _OF_ANY_MODULE and name in named and not isinstance(value, nn.Module)
        }
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        attributes = (text for item in sorted(state.items()) for text in item)
        return digest(self._class(type(module)), *attributes, *map(self, hooks))

    def pieces(self, function: Any, prefix: str) -> Iterator[tuple[str, str]]:
        """(name, fingerprint) of a function's code and of each thing it reads."""
        if isinstance(function, functools.partial):
            yield from self.pieces(function.func, prefix)
            yield f"{prefix}arguments", digest(self(function.args), self(function.keywords))
        elif isinstance(function, types.MethodType):
            yield from self.pieces(function.__func__, prefix)
            yield from self._attributes(function.__self__, prefix)
        elif isinstance(function, types.FunctionType):
            yield from self._function_pieces(function, prefix)
        elif isinstance(function, nn.Module):
            for part, pieces in self.model(function).items():
                yield from ((f"{prefix}{part}.{name}", value) for name, value in pieces.items())
        elif wraps(function):
            yield from self.pieces(function.__wrapped__, prefix)
        elif not isinstance(function, type) and is_own(function):
            yield f"{prefix}code", self._class(type(function))
            yield from self._attributes(function, prefix)
        else:
            yield f"{prefix}code", self(function) if isinstance(function, type) else _name(function)

    def _attributes(self, value: Any, prefix: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, type) or not is_own(value):
            yield f"{prefix}self", self(value)
            return
        for name, each in _state(value).items():
            yield from self._named(each, f"{prefix}{name}")

    def _named(self, value: Any, name: str) -> Iterator[tuple[str, str]]:
        if is_code(value):
            yield from self.pieces(value, f"{name}.")
        else:
            yield name, self(value)

    def _function_pieces(self, function: types.FunctionType, prefix: str) -> Iterator[tuple[str, str]]:
        if id(function) in self._open and prefix:
            return
        self._open.add(id(function))
        try:
            if installed(function):
                yield f"{prefix}code", _name(function)
            else:
                defaults = digest(self(function.__defaults__), self(function.__kwdefaults__))
                yield f"{prefix}code", digest(self(function.__code__), defaults)
            for name, value in read_by(function).items():
                yield from self._named(value, f"{prefix}{name}")
        finally:
            self._open.discard(id(function))


def _ends(entries: Sequence[Any]) -> Sequence[Any]:
    return entries if len(entries) <= 2 * LONGEST else [*entries[:LONGEST], *entries[-LONGEST:]]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _state(value: Any) -> dict[str, Any]:
    """An object's attributes, those in slots too."""
    slots = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    names = [*slots, *(field.name for field in dataclasses.fields(value))] if dataclasses.is_dataclass(value) else slots
    return {name: getattr(value, name) for name in names if hasattr(value, name)} | dict(getattr(value, "__dict__", {}))
