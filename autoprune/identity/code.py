"""Whose code is what: which functions and classes are a user's own, and what they read by name."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import nn

_PACKAGE = __name__.partition(".")[0]
_OURS = str(Path(__file__).parents[1])
_STANDARD = sysconfig.get_path("stdlib")
_CONSTRUCTION = frozenset({"__init__", "__new__", "__post_init__"})
_OF_A_FILE = frozenset({"__builtins__", "__file__", "__loader__", "__path__", "__spec__"})
_BY_ANY_NAME = frozenset({"vars", "__dict__", "__getattribute__", "attrgetter", "asdict", "astuple", "model_dump"})


def is_code(value: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
    return isinstance(value, kinds) or wraps(value)


def wraps(value: Any) -> bool:
    """Whether it is a decorated function, such as a cached one; asks no ``__getattr__`` of an object."""
    return callable(value) and callable(inspect.getattr_static(value, "__wrapped__", None))


def functions_of(value: Any) -> list[Any]:
    """The functions behind an attribute of a class, and the arguments they are bound to; none behind a plain value."""
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [each for each in (value.fget, value.fset, value.fdel) if each is not None]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, functools.partialmethod):
        return [*(functions_of(value.func) or [value.func]), (value.args, value.keywords)]
    if isinstance(value, functools.singledispatchmethod):
        return [value.dispatcher.dispatch, *functions_of(value.func)]
    return [value] if is_code(value) else []


def _is_users(function: Any) -> bool:
    """Whether it is a user's function, or a decorator's around one."""
    while isinstance(function, types.FunctionType) and installed(function) and wraps(function):
        function = function.__wrapped__  # type: ignore[attr-defined]
    return isinstance(function, types.FunctionType) and not installed(function)


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
    return str(type(value).__module__).partition(".")[0] == _PACKAGE or not installed_class(type(value))


def installed_class(kind: type) -> bool:
    return _installed_root(str(kind.__module__))


def _installed_root(name: str) -> bool:
    """Whether a module, by its dotted name, is of Python, of this package or of an installed one."""
    root = name.partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None)
    if root not in sys.modules:
        spec = PathFinder.find_spec(root)
        file = spec.origin if spec is not None else None
    return root in (*sys.stdlib_module_names, "builtins", _PACKAGE) or bool(file and _installed_file(file))


def members(kind: type, made: bool) -> dict[str, Any]:
    """What a user wrote in a class and its bases: methods, whatever decorates them, and values.

    Args:
        kind: an installed class has what the user put in place of its functions.
        made: objects of it may be made: what makes them counts. Of an object that is there, its attributes tell that.
    """
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        own = not installed_class(base)
        for name, value in vars(base).items():
            if name in _CONSTRUCTION and not made:
                continue
            functions = functions_of(value)
            if not functions and (not own or (name.startswith("__") and name.endswith("__"))):
                continue
            if own or any(map(_is_users, functions)):
                found[name if name not in found else f"{base.__qualname__}.{name}"] = value
    return found


@functools.lru_cache(maxsize=1024)
def mentioned(kind: type) -> frozenset[str]:
    """Every name and text in the code of the methods that a class has of installed ones."""
    found: set[str] = set()

    def read(code: types.CodeType) -> None:
        found.update(code.co_names)
        found.update(constant for constant in code.co_consts if isinstance(constant, str))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                read(constant)

    for base in kind.__mro__:
        if base is not nn.Module and installed_class(base):
            for value in vars(base).values():
                for function in functions_of(value):
                    unwrapped = inspect.unwrap(function) if isinstance(function, types.FunctionType) else function
                    if isinstance(unwrapped, types.FunctionType):
                        read(unwrapped.__code__)
    return frozenset(found)


@dataclass(frozen=True)
class Named:
    """What code names.

    Attributes:
        outside: globals, in order.
        inside: attributes, members and texts, which may be names of attributes.
        modules: (level, name) of what it imports.
        any: it takes attributes whose names it makes up, as ``getattr(self, f"k_{i}")`` does.
    """

    outside: tuple[str, ...]
    inside: frozenset[str]
    modules: tuple[tuple[int, str], ...]
    any: bool


@functools.lru_cache(maxsize=4096)
def named_in(code: types.CodeType) -> Named:
    """What code and the functions within it name in reading; names that it only writes are none."""
    outside: dict[str, None] = {}
    inside: set[str] = set()
    modules: dict[tuple[int, str], None] = {}
    made_up = False
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for at, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            outside[str(step.argval)] = None
            made_up |= step.argval in _BY_ANY_NAME or (step.argval == "getattr" and not _by_constant(steps[at + 1 :]))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            inside.add(str(step.argval))
            made_up |= step.argval in _BY_ANY_NAME
        elif step.opname == "IMPORT_NAME":
            level = steps[at - 2].argval
            modules[level if isinstance(level, int) else 0, str(step.argval)] = None
    for constant in code.co_consts:
        if isinstance(constant, str):
            inside.add(constant)
        elif isinstance(constant, (tuple, frozenset)):
            inside.update(each for each in constant if isinstance(each, str))
        elif isinstance(constant, types.CodeType):
            within = named_in(constant)
            outside |= dict.fromkeys(within.outside)
            modules |= dict.fromkeys(within.modules)
            inside |= within.inside
            made_up |= within.any
    return Named(tuple(outside), frozenset(inside), tuple(modules), made_up)


def _by_constant(steps: list[dis.Instruction]) -> bool:
    """Whether the call of ``getattr`` that begins here is given its name as a constant."""
    arguments: list[Any] = []
    for step in steps:
        if step.opname.startswith("LOAD_CONST"):
            arguments.append(step.argval)
        elif step.opname.startswith(("LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_SMALL_INT")):
            arguments += [None] * (len(step.argval) if isinstance(step.argval, tuple) else 1)
        elif step.opname.startswith("CALL"):
            break
        elif step.opname not in ("LOAD_ATTR", "PRECALL", "PUSH_NULL"):
            return False
    return len(arguments) > 1 and isinstance(arguments[1], str)


def read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads by name from around it.

    Cells of its closure; and of a user's function its defaults, attributes of its own, globals, and what it imports.
    Of modules, the members that it names: all of a user's, and functions of a user's that stand in an installed one.
    """
    code = function.__code__
    cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and cell != types.CellType():
            yield name, cell.cell_contents
    own = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
    wrapped = vars(function).get("__wrapped__")
    if wrapped is not None and not any(cell.cell_contents is wrapped for cell in cells):
        yield "wrapped", wrapped
    if installed(function):
        return
    named = named_in(code)
    defaults = function.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    yield from ((name, value) for name, value in own.items() if named.any or name in named.inside)
    around = function.__globals__
    texts = sorted(named.inside) if "globals" in named.outside else []
    for name in dict.fromkeys([*named.outside, *texts]):
        if name in around and name not in _OF_A_FILE:
            if isinstance(around[name], types.ModuleType):
                yield from _members(name, around[name], named.inside, set())
            else:
                yield name, around[name]
    for level, name in named.modules:
        yield from _imported(level, name, around, named.inside)


def _members(name: str, module: types.ModuleType, named: frozenset[str], met: set[int]) -> Iterator[tuple[str, Any]]:
    if id(module) in met:
        return
    met.add(id(module))
    own = not _installed_root(module.__name__)
    for each in sorted(named & vars(module).keys()):
        held = vars(module)[each]
        if isinstance(held, types.ModuleType):
            yield from _members(f"{name}.{each}", held, named, met)
        elif not each.startswith("__") and (own or _is_users(held)):
            yield f"{name}.{each}", held


def _imported(level: int, name: str, around: dict[str, Any], named: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """What a function takes of a user's module that it imports itself; nothing is imported for it."""
    if level:
        package = str(around.get("__package__") or "").split(".")
        name = ".".join([*package[: len(package) - level + 1], *([name] if name else [])])
    if not name or _installed_root(name):
        return
    if not _not_yet_imported(name):
        if isinstance(module := sys.modules.get(name), types.ModuleType):
            yield from _members(name, module, named, set())
    elif (code := _of_file(name)) is not None:
        yield f"{name} (its file)", code


@functools.cache
def _not_yet_imported(name: str) -> bool:
    """When it was first asked for: it is known by its file from then on, or importing it would look like a change."""
    return name not in sys.modules


def _of_file(name: str) -> types.CodeType | bytes | None:
    """The code of a module that is not run; nothing where it is not found."""
    spec, path = None, None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    source = Path(spec.origin).read_bytes()
    try:
        return compile(source, spec.origin, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return source
