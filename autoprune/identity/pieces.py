"""What a value is made of, piece by piece, each with a name: so that a message can say which one has changed."""

from __future__ import annotations

import argparse
import enum
import functools
import re
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autoprune.identity.code import functions_of, installed_class, is_code, is_own, members, read_by, wraps
from autoprune.identity.digest import digest, is_plain, name_of
from autoprune.identity.reach import Reach
from autoprune.identity.state import Alive, built_in, state_of, taken_apart

MOST_PIECES = 5_000  # of a part; what comes then has one piece each
_LEVELS = 8  # of names within names; what lies deeper is one piece
_ENTRIES = 50  # of a dictionary that is read by piece
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_OF_PYTHON = 1 << 9  # of a class that was made by a class statement


class Reader(Protocol):
    """What makes one text of a value."""

    def __call__(self, value: Any) -> str:
        """The text; of a value that was read before, the same."""

    def remember(self, value: Any, text: str) -> None:
        """From here on, `text` stands for `value`."""

    def entries(self, content: Any) -> str:
        """What a container of Python's holds."""

    def class_code(self, kind: type, made: bool) -> str:
        """A class by its name and the code of its methods, whatever they read."""

    def function_code(self, function: Any) -> str:
        """A function by its code, whatever it reads."""


class Pieces:
    """Takes values apart; what was given a name is referred to by it wherever it is met again.

    Args:
        read: reads what has no pieces.
        reach: which attributes code can read.
    """

    def __init__(self, read: Reader, reach: Reach) -> None:
        self._read, self._reach = read, reach
        self._told: dict[int, tuple[Any, str]] = {}  # what has pieces of its own, and the name to refer to them by
        self._classes: dict[tuple[int, bool], tuple[type, str]] = {}  # likewise; of what makes objects, and of objects
        self._models = self._count = 0

    def reference(self, value: Any) -> str | None:
        """The text that refers to the pieces of `value`, where it was given any."""
        return self._told[id(value)][1] if id(value) in self._told else None

    @contextmanager
    def classes_forgotten(self) -> Iterator[None]:
        """Classes that are read meanwhile are read again afterwards."""
        classes = dict(self._classes)
        try:
            yield
        finally:
            self._classes = classes

    def by_piece(self, value: Any, name: str) -> dict[str, str]:
        """What `value` is made of, by name."""
        if name:
            return _joined(self._named(value, name))
        self._told[id(value)] = value, digest("itself")
        return _joined(self._pieces_of(value, ""))

    def whole(self, value: Any) -> str:
        """One text of all pieces. They are digested here: nothing may refer to them by name."""
        pieces, told = self._count, dict(self._told) if isinstance(value, nn.Module) else self._told
        self._count = MOST_PIECES  # so that each is a text
        try:
            return digest(*(text for piece in self._pieces_of(value, "") for text in piece))
        finally:
            self._told, self._count = told, pieces

    def model(self, model: nn.Module) -> dict[str, dict[str, str]]:
        """Part -> name -> text: weights, buffers and architecture of a model."""
        self._models += 1
        number = str(self._models)
        first: dict[int, tuple[str, str]] = {}  # tensor -> the name it is first known by, and what it is

        def tensors(named: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
            found = {}
            for name, value in named:
                if id(value) not in first:
                    first[id(value)] = name, self._read(value)
                found[name] = digest(*first[id(value)], str(value.requires_grad))  # what is shared stays so
                # from here on
                self._read.remember(value, digest("a tensor of the model", number, first[id(value)][0]))
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
        kept = {n: value for n, value in state.items() if installed_class(kind) and is_plain(value)}
        settings = (text for n, value in kept.items() for text in (n, self._read(value)))
        yield whole, digest(self._read.class_code(kind, False), *settings)
        if (id(kind), False) not in self._classes:
            yield from self._class_pieces(kind, False, f"class {kind.__qualname__}.")
        for n, value in state.items():
            if n not in kept:
                yield from self._named(value, f"{prefix}{n}")
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for number, hook in enumerate(hooks, 1):
            yield from self._named(hook, f"{prefix}hook {number}")

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
                for each, value in _reads_of(function):
                    if (each, id(value)) not in read:
                        read.add((each, id(value)))
                        yield from self._named(value, f"{prefix}{name}.{each}")

    def _named(self, value: Any, name: str) -> Iterator[tuple[str, str]]:
        """The pieces of a value, or itself as one: so that a piece that changes of itself leaves the others telling."""
        self._count += 1
        within = is_code(value) or isinstance(value, (type, nn.Module)) or holds_more(value) or _is_small(value)
        if not within or id(value) in self._told or self._count > MOST_PIECES or name.count(".") >= _LEVELS:
            yield name, self._read(value)
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
            yield f"{prefix}code", digest(value.__func__.__qualname__, self._read.function_code(value.__func__))
            yield from self._read_pieces(value.__func__, prefix)
            if id(value.__self__) in self._told or not is_own(value.__self__):
                yield from self._named(value.__self__, f"{prefix}self")
            else:
                if self._count < MOST_PIECES:
                    self._told[id(value.__self__)] = value.__self__, digest("told", prefix)
                yield from self._pieces_of(value.__self__, prefix)
        elif isinstance(value, types.FunctionType):
            yield f"{prefix}code", self._read.function_code(value)
            yield from self._read_pieces(value, prefix)
        elif isinstance(value, nn.Module):
            for part, pieces in self.model(value).items():
                yield from ((f"{prefix}{part}.{name}", text) for name, text in pieces.items())
        elif isinstance(value, type):
            yield f"{prefix}code", self._read.class_code(value, True)
            yield from self._class_pieces(value, True, prefix)
        elif wraps(value):
            yield from self._pieces_of(value.__wrapped__, prefix)
        elif isinstance(value, types.BuiltinFunctionType):
            yield f"{prefix}code", name_of(value)
            yield from self._read_pieces(value, prefix)
        elif _is_small(value):
            yield f"{prefix}type", name_of(type(value))
            for name in sorted(value):
                yield from self._named(value[name], f"{prefix}{name}")
        elif holds_more(value):
            yield from self._object_pieces(value, prefix)
        else:
            yield f"{prefix}code", self._read(value)

    def _object_pieces(self, value: Any, prefix: str) -> Iterator[tuple[str, str]]:
        kind, state = type(value), state_of(value)
        yield f"{prefix}code", self._read.class_code(kind, False)
        yield from self._class_pieces(kind, False, prefix, hidden=state)
        content = built_in(value)
        if content is not None:
            yield f"{prefix}content", self._read.entries(content)
        elif any(not base.__flags__ & _OF_PYTHON for base in kind.__mro__ if base is not object):
            try:
                parts = taken_apart(value)
            except Alive:
                parts = None
            yield f"{prefix}content", self._read(parts and (parts[1], *parts[3:]))
        for name, each in state.items():
            if self._reach.reads(value, name):
                yield from self._named(each, f"{prefix}{name}")

    def _read_pieces(self, function: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for name, each in _reads_of(function):
            yield from self._named(each, f"{prefix}{name}")


def _reads_of(function: Any) -> Iterator[tuple[str, Any]]:
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


def holds_more(value: Any) -> bool:
    """Whether it is an object whose attributes are read by name."""
    if isinstance(value, (DataLoader, Dataset, argparse.Namespace, types.SimpleNamespace)):
        return True
    return not isinstance(value, (type, enum.Enum, Tensor, np.ndarray, PurePath, types.ModuleType)) and is_own(value)


def _is_small(value: Any) -> bool:
    """Whether it is a dictionary that is read by piece."""
    return type(value) is dict and len(value) <= _ENTRIES and all(type(key) is str for key in value)


def _arguments(function: functools.partial[Any]) -> list[tuple[str, Any]]:
    return [*((f"argument {i}", each) for i, each in enumerate(function.args, 1)), *function.keywords.items()]


def _joined(pieces: Iterable[tuple[str, str]]) -> dict[str, str]:
    """By name; two of one name are one, of both."""
    found: dict[str, str] = {}
    for name, text in pieces:
        found[name] = digest(found[name], text) if name in found else text
    return found
