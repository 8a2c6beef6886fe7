"""Whose code is what: which functions and classes are a user's own, and what they read by name."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

_PACKAGE = __name__.partition(".")[0]
_OURS = str(Path(__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")


def is_code(value: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
    return isinstance(value, kinds) or wraps(value)


def wraps(value: Any) -> bool:
    """Whether it is a decorated function, such as a cached one; asks no ``__getattr__`` of an object."""
    return callable(inspect.getattr_static(value, "__wrapped__", None))


def function_of(value: Any) -> types.FunctionType | None:
    """The function behind an attribute of a class."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, types.FunctionType) else None


def installed(function: types.FunctionType) -> bool:
    """Whether it belongs to Python, to this package or to an installed one."""
    return _installed_file(function.__code__.co_filename)


@functools.cache
def _installed_file(file: str) -> bool:
    return file.startswith((_OURS, _STANDARD, "<frozen")) or not {"site-packages", "dist-packages"}.isdisjoint(
        Path(file).parts
    )


def is_own(value: Any) -> bool:
    """Whether an object is of a class of the user's, or of this package: its attributes are read."""
    return type(value).__module__.partition(".")[0] == _PACKAGE or not installed_class(type(value))


def installed_class(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None)
    return root in (*sys.stdlib_module_names, "builtins", _PACKAGE) or bool(file and _installed_file(file))


def mentioned(kind: type) -> frozenset[str]:
    """Every name and text in the code of a class's methods, ``__init__`` left out."""
    found: set[str] = set()

    def read(code: types.CodeType) -> None:
        found.update(code.co_names)
        found.update(constant for constant in code.co_consts if isinstance(constant, str))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                read(constant)

    for base in kind.__mro__:
        for name, value in vars(base).items():
            function = function_of(value)
            if function is not None and name != "__init__" and base is not nn.Module:
                read(function.__code__)
    return frozenset(found)


def read_by(function: types.FunctionType) -> dict[str, Any]:
    """What a function reads from around it by name: cells of its closure and, of a user's function, globals.

    Of a user's module that it names, the members that it names.
    """
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and cell != types.CellType():
            found[name] = cell.cell_contents
    if installed(function):
        return found
    for name, member in _globals_named(function.__code__):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType) and member in vars(value):
            held = vars(value)[member]
            if isinstance(held, types.FunctionType) or not is_code(held):
                found[f"{name}.{member}"] = held
        else:
            found[name] = value
    return found


def _globals_named(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """(a global's name, the attribute taken of it or nothing), in the order of the code."""
    steps = list(dis.get_instructions(code))
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if step.opname == "LOAD_GLOBAL":
            taken = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            yield str(step.argval), str(following.argval) if taken and following is not None else ""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_named(constant)
