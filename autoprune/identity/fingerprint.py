"""Fingerprints: short texts that are equal in every process for what is the same, and differ for what is not.

Content counts: numbers, tensors, code, and what code reads. Where an object lives in memory, in which order a set gives
its members, the names of files and the numbers of lines do not. Code of Python's standard library and of installed
packages is known by its name. Objects of theirs are looked at as `copy` would take them apart, and nothing is made of
the parts; those that go on by themselves or draw random numbers, such as files, threads and generators, are known by
type. Of attributes, those count that code within reach can read (`Reach`).
"""

from __future__ import annotations

import enum
import pickle
import types
import weakref
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.identity.code import functions_of, installed, installed_class, is_code, is_own, members
from autoprune.identity.digest import PLAIN, code_name, digest, ends_of, name_of, tensor_fingerprint
from autoprune.identity.pieces import Pieces, holds_more
from autoprune.identity.reach import Reach
from autoprune.identity.state import Alive, built_in, taken_apart

DEEPEST = 40  # containers and objects within each other
_APART = 10_000  # objects of installed classes that are taken apart; of others the types count
_MAPPED = 2**24  # bytes read of an array that is a file, or of a buffer


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
    walk = _Walk(reach or Reach(model))
    return walk.pieces.model(model)


def architecture_fingerprint(model: nn.Module) -> str:
    """Of what a model computes, whatever its weights."""
    return digest(*(part for item in model_fingerprints(model)["architecture"].items() for part in item))


def function_fingerprints(function: Any, reach: Reach | None = None) -> dict[str, str]:
    """Of a function's code, and of each thing that it reads: closures, globals, attributes, and those of its helpers.

    Args:
        function: or any object that is called like one.
        reach: of all the code that may read attributes of what it reads; by default, of its own.
    """
    walk = _Walk(reach or Reach(function))
    return walk.pieces.by_piece(function, "")


def value_fingerprints(value: Any, name: str, reach: Reach) -> dict[str, str]:
    """Of each thing that an object holds, by names that begin with `name`; of a plain value, that alone."""
    walk = _Walk(reach)
    return walk.pieces.by_piece(value, name)


def fingerprint(value: Any, reach: Reach | None = None) -> str:
    """Of any value; an object that is nobody's own, such as a file or a lock, is known by its type."""
    return _Walk(reach or Reach(value))(value)


class _Walk:
    """One walk over values, each read once: what contains itself is not followed again."""

    def __init__(self, reach: Reach) -> None:
        self.pieces = Pieces(weakref.proxy(self), reach)  # by reference counts alone, what was read can be freed
        self._open: set[int] = set()
        self._known: dict[int, tuple[Any, str]] = {}  # the value is kept, or its id would be given to another
        self._alive_met, self._alive = 0, set[int]()  # see `Alive`
        self._apart = 0

    def __call__(self, value: Any) -> str:
        if type(value) in PLAIN:
            return digest(name_of(type(value)), repr(value))
        reference = self.pieces.reference(value)
        if reference is not None:
            return reference
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
        self.remember(value, found)
        if is_code(value) or is_own(value):
            self._alive_met = met  # a user's object may hold one and be a value all the same
        elif self._alive_met > met:
            self._alive.add(id(value))
        return found

    def remember(self, value: Any, text: str) -> None:
        """From here on, `text` stands for `value`."""
        self._known[id(value)] = value, text

    def _read(self, value: Any) -> str:
        kind = name_of(type(value))
        if isinstance(value, enum.Enum):
            return digest(kind, self.class_code(type(value), False), value.name, self(vars(value).get("_value_")))
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
            return digest("class", name_of(value))
        if isinstance(value, (type, nn.Module)) or is_code(value) or holds_more(value):
            return self.pieces.whole(value)
        content = built_in(value)
        return digest(kind, self.entries(content)) if content is not None else self._installed(value, kind)

    def entries(self, content: Any) -> str:
        """What a container of Python's holds."""
        if isinstance(content, frozenset):
            return digest("set", *sorted(map(self._by_itself, content)))  # their order depends on the hash seed
        if isinstance(content, dict):
            entries = ends_of(list(content.items()))
            return digest(str(len(content)), *sorted(digest(self(key), self(each)) for key, each in entries))
        if not isinstance(content, (list, tuple)):
            return digest(content)
        ends = ends_of(content)
        if all(type(each) in PLAIN for each in ends):
            return digest("plain", str(len(content)), repr(list(ends)))
        return digest(str(len(content)), *map(self, ends))

    def _by_itself(self, value: Any) -> str:
        """Of a value, whatever was read before it."""
        if type(value) in PLAIN:
            return self(value)
        known = dict(self._known)
        try:
            with self.pieces.classes_forgotten():
                return self(value)
        finally:
            self._known = known

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

    def class_code(self, kind: type, made: bool) -> str:
        """A class by its name and the code of its methods, whatever they read."""
        parts = [kind.__qualname__ if not installed_class(kind) else name_of(kind)]
        for name, member in members(kind, made).items():
            functions = functions_of(member)
            parts += [name, *map(self.function_code, functions)] if functions else []
        return digest(*parts)

    def function_code(self, function: Any) -> str:
        """A function by its code, whatever it reads."""
        if isinstance(function, types.FunctionType):
            return code_name(function) if installed(function) else self(function.__code__)
        return name_of(function)
