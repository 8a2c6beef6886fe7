"""Fingerprints: short texts that are equal in every process for what is the same, and differ for what is not.

Content counts: numbers, tensors, code, and what code reads. Where an object lives in memory, in which order a set gives
its members, the names of files and the numbers of lines do not. Code of Python's standard library and of installed
packages is known by its name. Objects of theirs are looked at as `copy` would take them apart, and nothing is made of
the parts; those that go on by themselves or draw random numbers, such as files, threads and generators, are known by
type. Of attributes, those count that code within reach can read (`Reach`).
"""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import pickle
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autoprune.identity.code import functions_of, installed, installed_class, is_code, is_own, members, read_by, wraps
from autoprune.identity.reach import Reach
from autoprune.identity.state import LONGEST, Alive, built_in, state_of, taken_apart

DEEPEST = 40  # containers and objects within each other
MOST_PIECES = 5_000  # of a part; what comes then has one piece each
_LEVELS = 8  # of names within names; what lies deeper is one piece
_ENTRIES = 50  # of a dictionary that is read by piece
_APART = 10_000  # objects of installed classes that are taken apart; of others the types count
_MAPPED = 2**24  # bytes read of an array that is a file, or of a buffer
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


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
    walk = _Walk(Reach())
    return digest(*(part for name, value in sorted(tensors.items()) for part in (name, walk(value))))


def model_fingerprints(model: nn.Module, reach: Reach | None = None) -> dict[str, dict[str, str]]:
    """Of a model's weights and buffers by name, and of what each of its modules is and does with them.

    Args:
        model: only looked at.
        reach: of all the code that may read the model's attributes; by default, of its own.
    """
    return _Walk(reach or Reach(model)).model(model)


def architecture_fingerprint(model: nn.Module) -> str:
    """Of what a model computes, whatever its weights."""
    return digest(*(part for item in model_fingerprints(model)["architecture"].items() for part in item))


def function_fingerprints(function: Any, reach: Reach | None = None) -> dict[str, str]:
    """Of a function's code, and of each thing that it reads: closures, globals, attributes, and those of its helpers.

    Args:
        function: or any object that is called like one.
        reach: of all the code that may read attributes of what it reads; by default, of its own.
    """
    return _Walk(reach or Reach(function)).by_piece(function, "")


def value_fingerprints(value: Any, name: str, reach: Reach) -> dict[str, str]:
    """Of each thing that an object holds, by names that begin with `name`; of a plain value, that alone."""
    return _Walk(reach).by_piece(value, name)


def fingerprint(value: Any, reach: Reach | None = None) -> str:
    """Of any value; an object that is nobody's own, such as a file or a lock, is known by its type."""
    return _Walk(reach or Reach(value))(value)


class _Walk:
    """One walk over values, each read once: what contains itself is not followed again."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._open: set[int] = set()
        self._known: dict[int, tuple[Any, str]] = {}  # the value is kept, or its id would be given to another
        self._told: dict[int, tuple[Any, str]] = {}  # what has pieces of its own, and the name to refer to them by
        self._classes: dict[tuple[int, bool], tuple[type, str]] = {}  # likewise; of what makes objects, and of objects
        self._alive_met, self._alive = 0, set[int]()  # see `Alive`
        self._models = self._pieces = self._apart = 0

    def __call__(self, value: Any) -> str:
        if type(value) in _PLAIN:
            return digest(_name(type(value)), repr(value))
        if id(value) in self._told:
            return self._told[id(value)][1]
        if id(value) in self._known:
            self._alive_met += id(value) in self._alive
            return self._known[id(value)][1]
        if id(value) in self._open or len(self._open) > DEEPEST:
            return "..."
        met = self._alive_met
        self._open.add(id(value))
        try:
            found = self._read(value)
        finally:
            self._open.discard(id(value))
        self._known[id(value)] = value, found
        if is_code(value) or is_own(value):
            self._alive_met = met  # a user's object may hold one and be a value all the same
        elif self._alive_met > met:
            self._alive.add(id(value))
        return found

    def by_piece(self, value: Any, name: str) -> dict[str, str]:
        """What `value` is made of, by name."""
        if name:
            return _joined(self._named(value, name))
        self._told[id(value)] = value, digest("itself")
        return _joined(self._pieces_of(value, ""))

    def _read(self, value: Any) -> str:
        kind = _name(type(value))
        if isinstance(value, enum.Enum):
            return digest(kind, self._class_code(type(value), False), value.name, self(vars(value).get("_value_")))
        if isinstance(value, (np.generic, torch.Size)):
            return digest(kind, repr(value))
        if isinstance(value, (torch.dtype, torch.device, slice, range, types.EllipsisType)):
            return digest(kind, str(value))
        if isinstance(value, PurePath):
            return digest("path", value.name)  # where it lies is not what it is
        if isinstance(value, Tensor):
            return tensor_fingerprint(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, pickle.PickleBuffer):
            with value.raw() as raw:
                return digest(kind, str(raw.nbytes), raw[:_MAPPED])
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.ModuleType):
            return digest("module", value.__name__)
        if isinstance(value, type) and installed_class(value) and not members(value, True):
            return digest("class", _name(value))
        if isinstance(value, (type, nn.Module)) or is_code(value) or _holds_more(value):
            return self._whole(value)
        content = built_in(value)
        return digest(kind, self._entries(content)) if content is not None else self._installed(value, kind)

    def _whole(self, value: Any) -> str:
        """One text of all pieces. They are digested here: nothing may refer to them by name."""
        pieces, told = self._pieces, dict(self._told) if isinstance(value, nn.Module) else self._told
        self._pieces = MOST_PIECES  # so that each is a text
        try:
            return digest(*(text for piece in self._pieces_of(value, "") for text in piece))
        finally:
            self._told, self._pieces = told, pieces

    def _entries(self, content: Any) -> str:
        if isinstance(content, frozenset):
            return digest("set", *sorted(map(self._by_itself, content)))  # their order depends on the hash seed
        if isinstance(content, dict):
            entries = _ends(list(content.items()))
            return digest(str(len(content)), *sorted(digest(self(key), self(each)) for key, each in entries))
        if not isinstance(content, (list, tuple)):
            return digest(content)
        ends = _ends(content)
        if all(type(each) in _PLAIN for each in ends):
            return digest("plain", str(len(content)), repr(list(ends)))
        return digest(str(len(content)), *map(self, ends))

    def _by_itself(self, value: Any) -> str:
        """Of a value, whatever was read before it."""
        if type(value) in _PLAIN:
            return self(value)
        known, classes = dict(self._known), dict(self._classes)
        try:
            return self(value)
        finally:
            self._known, self._classes = known, classes

    def _installed(self, value: Any, kind: str) -> str:
        self._apart += 1
        met = self._alive_met
        try:
            parts = taken_apart(value) if self._apart <= _APART else None
        except Alive:
            self._alive_met += 1
            return kind
        found = kind if parts is None else digest(kind, self(parts))
        return found if self._alive_met == met else kind

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

    def model(self, model: nn.Module) -> dict[str, dict[str, str]]:
        self._models += 1
        number = str(self._models)
        first: dict[int, tuple[str, str]] = {}  # tensor -> the name it is first known by, and what it is

        def tensors(named: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
            found = {}
            for name, value in named:
                if id(value) not in first:
                    first[id(value)] = name, self(value)
                found[name] = digest(*first[id(value)], str(value.requires_grad))  # what is shared stays so
                # from here on
                self._known[id(value)] = value, digest("a tensor of the model", number, first[id(value)][0])
            return found

        found = {
            "weights": tensors(model.named_parameters(remove_duplicate=False)),
            "buffers": tensors(model.named_buffers(remove_duplicate=False)),
        }
        modules = dict(model.named_modules())
        for name, module in modules.items():
            self._told.setdefault(id(module), (module, digest("a module of the model", number, name)))
        pieces = (piece for name, module in modules.items() for piece in self._module(module, name))
        return {**found, "architecture": _joined(pieces)}

    def _module(self, module: nn.Module, name: str) -> Iterator[tuple[str, str]]:
        """Its class, its attributes and its hooks. Submodules, parameters and buffers are read by themselves."""
        whole, prefix, kind = name or "as a whole", f"{name}." if name else "", type(module)
        if isinstance(module, torch.jit.ScriptModule):
            code = re.sub(r"___torch_mangle_\d+", "", str(getattr(module, "code", "")))
            yield whole, digest(module.original_name, code)
            return
        state = {
            name: value
            for name, value in sorted(vars(module).items())
            if name not in _OF_ANY_MODULE and not isinstance(value, nn.Module) and self._reach.reads(module, name)
        }
        # what an installed class keeps of its arguments has no names of its own: there is much of it, and it stays
        kept = {n: value for n, value in state.items() if installed_class(kind) and _is_plain(value)}
        settings = (text for n, value in kept.items() for text in (n, self(value)))
        yield whole, digest(self._class_code(kind, False), *settings)
        if (id(kind), False) not in self._classes:
            yield from self._class_pieces(kind, False, f"class {kind.__qualname__}.")
        for n, value in state.items():
            if n not in kept:
                yield from self._named(value, f"{prefix}{n}")
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for number, hook in enumerate(hooks, 1):
            yield from self._named(hook, f"{prefix}hook {number}")

    def _class_code(self, kind: type, made: bool) -> str:
        """A class by its name and the code of its methods, whatever they read."""
        parts = [kind.__qualname__ if not installed_class(kind) else _name(kind)]
        for name, member in members(kind, made).items():
            functions = functions_of(member)
            parts += [name, *map(self._function_code, functions)] if functions else []
        return digest(*parts)

    def _function_code(self, function: Any) -> str:
        if isinstance(function, types.FunctionType):
            return _code_name(function) if installed(function) else self(function.__code__)
        return _name(function)

    def _class_pieces(
        self, kind: type, made: bool, prefix: str, hidden: Iterable[str] = ()
    ) -> Iterator[tuple[str, str]]:
        """What the methods of a class read, and its values that code may read; of every class once.

        Args:
            kind: has the methods.
            made: as of `members`.
            prefix: of the names.
            hidden: values that an object has in place of its class's.
        """
        if (id(kind), made) in self._classes:
            yield f"{prefix}class", digest("told", self._classes[id(kind), made][1])
            return
        self._classes[id(kind), made] = kind, prefix
        read: set[tuple[str, int]] = set()
        for name, member in members(kind, made).items():
            functions = functions_of(member)
            if not functions and name not in hidden and self._reach.names(name.rpartition(".")[2]):
                yield from self._named(member, f"{prefix}{name}")
            for function in functions:
                for each, value in self._reads(function):
                    if (each, id(value)) not in read:
                        read.add((each, id(value)))
                        yield from self._named(value, f"{prefix}{name}.{each}")

    def _reads(self, function: Any) -> Iterator[tuple[str, Any]]:
        """What stands behind a function beside its own code."""
        if isinstance(function, types.FunctionType):
            yield from read_by(function)
        elif isinstance(function, functools.partial):
            yield from (("function", function.func), *_arguments(function))
        elif isinstance(function, types.MethodType):
            yield from (("function", function.__func__), ("self", function.__self__))
        elif wraps(function):
            yield "wrapped", function.__wrapped__
        elif not isinstance(function, types.BuiltinFunctionType):
            yield "arguments", function
        elif function.__self__ is not None and not isinstance(function.__self__, types.ModuleType):
            yield "self", function.__self__

    def _named(self, value: Any, name: str) -> Iterator[tuple[str, str]]:
        """The pieces of a value, or itself as one: so that a piece that changes of itself leaves the others telling."""
        self._pieces += 1
        within = is_code(value) or isinstance(value, (type, nn.Module)) or _holds_more(value) or _is_small(value)
        if not within or id(value) in self._told or self._pieces > MOST_PIECES or name.count(".") >= _LEVELS:
            yield name, self(value)
            return
        self._told[id(value)] = value, digest("told", name)
        yield from self._pieces_of(value, f"{name}.")

    def _pieces_of(self, value: Any, prefix: str) -> Iterator[tuple[str, str]]:
        """(name, text) of all that a value is made of."""
        if isinstance(value, functools.partial):
            yield from self._pieces_of(value.func, prefix)
            for name, each in _arguments(value):
                yield from self._named(each, f"{prefix}{name}")
        elif isinstance(value, types.MethodType):
            yield f"{prefix}code", digest(value.__func__.__qualname__, self._function_code(value.__func__))
            yield from self._read_pieces(value.__func__, prefix)
            if id(value.__self__) in self._told or not is_own(value.__self__):
                yield from self._named(value.__self__, f"{prefix}self")
            else:
                if self._pieces < MOST_PIECES:
                    self._told[id(value.__self__)] = value.__self__, digest("told", prefix)
                yield from self._pieces_of(value.__self__, prefix)
        elif isinstance(value, types.FunctionType):
            yield f"{prefix}code", self._function_code(value)
            yield from self._read_pieces(value, prefix)
        elif isinstance(value, nn.Module):
            for part, pieces in self.model(value).items():
                yield from ((f"{prefix}{part}.{name}", text) for name, text in pieces.items())
        elif isinstance(value, type):
            yield f"{prefix}code", self._class_code(value, True)
            yield from self._class_pieces(value, True, prefix)
        elif wraps(value):
            yield from self._pieces_of(value.__wrapped__, prefix)
        elif isinstance(value, types.BuiltinFunctionType):
            yield f"{prefix}code", _name(value)
            yield from self._read_pieces(value, prefix)
        elif _is_small(value):
            yield f"{prefix}type", _name(type(value))
            for name in sorted(value):
                yield from self._named(value[name], f"{prefix}{name}")
        elif _holds_more(value):
            yield from self._object_pieces(value, prefix)
        else:
            yield f"{prefix}code", self(value)

    def _object_pieces(self, value: Any, prefix: str) -> Iterator[tuple[str, str]]:
        kind, state = type(value), state_of(value)
        yield f"{prefix}code", self._class_code(kind, False)
        yield from self._class_pieces(kind, False, prefix, hidden=state)
        content = built_in(value)
        if content is not None:
            yield f"{prefix}content", self._entries(content)
        elif any(not base.__flags__ & _OF_PYTHON for base in kind.__mro__ if base is not object):
            try:
                parts = taken_apart(value)
            except Alive:
                parts = None
            yield f"{prefix}content", self(parts and (parts[1], *parts[3:]))
        for name, each in state.items():
            if self._reach.reads(value, name):
                yield from self._named(each, f"{prefix}{name}")

    def _read_pieces(self, function: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for name, each in self._reads(function):
            yield from self._named(each, f"{prefix}{name}")


_OF_PYTHON = 1 << 9  # of a class that was made by a class statement


def _holds_more(value: Any) -> bool:
    """Whether it is an object whose attributes are read by name."""
    if isinstance(value, (DataLoader, Dataset, argparse.Namespace, types.SimpleNamespace)):
        return True
    return not isinstance(value, (type, enum.Enum, Tensor, np.ndarray, PurePath, types.ModuleType)) and is_own(value)


def _is_small(value: Any) -> bool:
    return type(value) is dict and len(value) <= _ENTRIES and all(type(key) is str for key in value)


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _arguments(function: functools.partial[Any]) -> list[tuple[str, Any]]:
    return [*((f"argument {i}", each) for i, each in enumerate(function.args, 1)), *function.keywords.items()]


def _joined(pieces: Iterable[tuple[str, str]]) -> dict[str, str]:
    """By name; two of one name are one, of both."""
    found: dict[str, str] = {}
    for name, text in pieces:
        found[name] = digest(found[name], text) if name in found else text
    return found


def _ends(entries: Sequence[Any]) -> Sequence[Any]:
    return entries if len(entries) <= 2 * LONGEST else [*entries[:LONGEST], *entries[-LONGEST:]]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _code_name(function: Any) -> str:
    return f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"
