"""What objects hold: attributes of a user's, and the parts of an installed class's, as they would be copied."""

from __future__ import annotations

import collections
import copyreg
import random
import types
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from autoprune.identity.code import installed, installed_class, is_own

LONGEST = 2_000  # entries of a list that are read one by one; of a longer one, its length and as many from either end
_LOADER = ("dataset", "sampler", "batch_sampler", "collate_fn", "batch_size", "drop_last")
_DRAWS = (
    torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, np.random.SeedSequence,
    random.Random,
)  # fmt: skip
_BY_TYPE = ("os.", "torch._C.", "torch._dynamo.", "torch.fx.", "torch.utils.hooks.")  # os: the environment
_ALIVE = {
    "_io", "_queue", "_socket", "_thread", "_weakref", "asyncio", "concurrent", "contextvars", "ctypes", "io", "mmap",
    "multiprocessing", "queue", "sched", "selectors", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading",
    "weakref",
}  # fmt: skip
_PROTOCOL = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__", "__iter__", "items")
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class Alive(Exception):
    """An object that goes on by itself, such as a file, a thread or an iterator: what it holds is not what it is."""


def state_of(value: Any) -> dict[str, Any]:
    """An object's attributes by name, those in slots too, without asking its code. Of a loader, what it reads."""
    try:
        found = dict(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        found = {}
    for base in type(value).__mro__:
        for name, slot in vars(base).items() if "__slots__" in vars(base) else ():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    found[name] = slot.__get__(value, type(value))
                except AttributeError:  # it has no value yet
                    continue
    if isinstance(value, DataLoader):
        plain = {name: found[name] for name in _LOADER if name in found}
        return plain if not is_own(value) else {name: found[name] for name in sorted(found) if name != "_iterator"}
    return dict(sorted(found.items()))


def is_alive(value: Any) -> bool:
    """Whether an object goes on by itself: a file, a thread, an iterator, or what holds one together."""
    return isinstance(value, Iterator) or str(type(value).__module__).partition(".")[0] in _ALIVE


def built_in(value: Any) -> Any:
    """What an object holds as one of Python's own types, which its class may be derived from; else None."""
    if isinstance(value, dict):
        entries = dict.copy(value)
        return (entries, value.default_factory) if isinstance(value, collections.defaultdict) else entries
    if isinstance(value, types.MappingProxyType):
        return dict(value)
    if isinstance(value, list):
        return list.copy(value)
    if isinstance(value, tuple):
        return tuple.__getitem__(value, slice(None))
    if isinstance(value, (set, frozenset)):
        return frozenset(set.__iter__(value) if isinstance(value, set) else frozenset.__iter__(value))
    if isinstance(value, _VIEWS):
        return list(value)
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    for kind in (str, bytes, int, float, complex):
        if isinstance(value, kind):
            return kind.__repr__(value)
    return None


def taken_apart(value: Any) -> Any:
    """The parts that `copy` would make another one of: data that is only looked at. None where its type says it all.

    What draws random numbers is known by its type, and so is what a user's code would have to be run for.

    Raises:
        Alive: it cannot be copied, or only without what it is at.
    """
    kind, module = type(value), str(type(value).__module__)
    if isinstance(value, _DRAWS) or f"{module}.".startswith(_BY_TYPE):
        return None
    if is_alive(value):
        raise Alive
    reduce = copyreg.dispatch_table.get(kind)
    if reduce is None and not all(map(installed_class, _asked(kind))):
        return None
    if isinstance(reduce, types.FunctionType) and not installed(reduce):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = value.__reduce_ex__(5) if reduce is None else reduce(value)
    except Exception:
        raise Alive from None
    if not isinstance(found, tuple):
        return str(found)
    made_by, arguments, state, entries, items = [*found, None, None, None][:5]
    return made_by, arguments, state, list(islice(entries or (), LONGEST)), list(islice(items or (), LONGEST))


def _asked(kind: type) -> Iterator[type]:
    """The classes whose code says what the parts are."""
    for name in _PROTOCOL:
        base = next((base for base in kind.__mro__ if name in vars(base)), None)
        if base is not None:
            yield base
