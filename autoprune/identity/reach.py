"""Which attributes code can read: what is merely noted down, such as when a model was built, changes nothing."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.identity.code import functions_of, installed, members, mentioned, named_in, read_by, wraps
from autoprune.identity.state import is_alive, state_of

_MOST = 50_000  # objects that are looked through
_ENTRIES = 1_000  # of a container
_WITHOUT = (type(None), bool, int, float, complex, str, bytes, Tensor, np.generic, torch.dtype, types.ModuleType)

_CLOSED = (types.FunctionType, type, torch.jit.ScriptModule, logging.Logger)


class Reach:
    """The names by which a user's code takes attributes, wherever it is reached from some objects.

    Where there is no such code, or it makes names up, every attribute counts.
    """

    def __init__(self, *roots: Any) -> None:
        self._names: set[str] = set()
        self._any, self._met = False, False
        seen: dict[Any, Any] = {}
        pending = [*roots]
        while pending and not self._any:
            value = pending.pop()
            if not isinstance(value, _WITHOUT) and id(value) not in seen:
                seen[id(value)] = value  # kept, or its id would be given to another
                pending.extend(self._within(value, seen))
                self._any |= len(seen) > _MOST
        self._any |= not self._met

    def reads(self, holder: Any, name: str) -> bool:
        """Whether code may read an attribute of an object: it names it, or it finds it in place of its class's."""
        kind: Any = type(holder)
        if self._any or name in self._names or name in mentioned(kind):
            return True
        return inspect.getattr_static(kind, name, None) is not None

    def names(self, name: str) -> bool:
        return self._any or name in self._names

    def _within(self, value: Any, seen: dict[Any, Any]) -> Iterator[Any]:
        if isinstance(value, types.FunctionType):
            if not installed(value):
                named = named_in(value.__code__)
                self._met = True
                self._any |= named.any
                self._names |= named.inside
            yield from (held for _, held in read_by(value))
        elif isinstance(value, types.CodeType):
            self._names |= named_in(value).inside
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, types.BuiltinFunctionType):
            yield value.__self__
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, type):
            yield from self._of_class(value, True, seen)
        elif wraps(value):
            yield value.__wrapped__
        elif isinstance(value, (dict, types.MappingProxyType)):
            entries: Mapping[Any, Any] = dict.copy(value) if isinstance(value, dict) else value
            yield from (each for item in islice(entries.items(), _ENTRIES) for each in item)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            base = next(each for each in (list, tuple, set, frozenset, deque) if isinstance(value, each))
            yield from islice(base.__iter__(value), _ENTRIES)  # type: ignore[arg-type]
        if not isinstance(value, _CLOSED) and not is_alive(value):
            yield from self._of_class(type(value), False, seen)
            yield from state_of(value).values()

    def _of_class(self, kind: type, made: bool, seen: dict[Any, Any]) -> Iterator[Any]:
        if (id(kind), made) not in seen:
            seen[id(kind), made] = kind
            for member in members(kind, made).values():
                yield from functions_of(member) or [member]
