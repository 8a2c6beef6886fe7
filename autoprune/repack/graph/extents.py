"""Extents that a call may choose: what they must satisfy, as data that a file can hold, and choosing some that do.

A condition is nested JSON: an integer, ``{"extent": number}`` or ``[operation, operand, ...]``; it holds where it is
not zero. They are what torch.export found out about a model's shapes: the branch it takes, what must divide what.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from autoprune.errors import AutopruneError, FileError
from autoprune.repack.graph.ir import Input

DEEPEST = 60  # nesting of a condition
OPERATIONS: Mapping[str, Callable[..., int]] = {
    "add": lambda *given: sum(given),
    "mul": lambda *given: math.prod(given),
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": max,
    "min": min,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "and": lambda *given: all(given),
    "or": lambda *given: any(given),
    "not": operator.not_,
}
_ARITY = {"add": None, "mul": None, "max": None, "min": None, "and": None, "or": None, "not": 1}  # else 2
_SIGNS = {"add": "+", "mul": "*", "floordiv": "//", "mod": "%", "eq": "==", "ne": "!=", "lt": "<", "le": "<="}


def value_of(condition: Any, extents: Mapping[int, int]) -> int:
    """What a condition or expression is for these extents; raises ZeroDivisionError where it divides by zero."""
    if isinstance(condition, int):
        return condition
    if isinstance(condition, dict):
        return extents[condition["extent"]]
    name, *operands = condition
    return int(OPERATIONS[name](*(value_of(each, extents) for each in operands)))


def holds(condition: Any, extents: Mapping[int, int]) -> bool:
    """Whether these extents satisfy a condition."""
    try:
        return bool(value_of(condition, extents))
    except ZeroDivisionError:  # of an empty batch: what a remainder must not be, none is not
        return isinstance(condition, list) and condition[0] == "ne"


def told(condition: Any, names: Mapping[int, str]) -> str:
    """A condition as its reader would write it."""
    if isinstance(condition, int):
        return str(condition)
    if isinstance(condition, dict):
        return names[condition["extent"]]
    name, *operands = condition
    inside = [told(each, names) for each in operands]
    inside = [f"({text})" if " " in text and name in ("mul", "floordiv", "mod") else text for text in inside]
    if name in _SIGNS:
        return f" {_SIGNS[name]} ".join(inside)
    return f" {name} ".join(inside) if name in ("and", "or") else f"{name}({', '.join(inside)})"


def numbers_in(condition: Any) -> set[int]:
    """The numbers of the extents that a condition is about."""
    if isinstance(condition, dict):
        return {condition["extent"]}
    return set() if isinstance(condition, int) else set().union(*(numbers_in(each) for each in condition[1:]))


def check(condition: Any, numbers: Collection[int], depth: int = 0) -> None:
    """Raises FileError unless it is a condition on extents of these numbers."""
    if type(condition) is int and abs(condition) < 2**31:
        return
    if isinstance(condition, dict) and len(condition) == 1 and condition.get("extent") in numbers:
        return
    if isinstance(condition, list) and len(condition) > 1 and depth < DEEPEST:
        name, *operands = condition
        if isinstance(name, str) and name in OPERATIONS and len(operands) == (_ARITY.get(name, 2) or len(operands)):
            for each in operands:
                check(each, numbers, depth + 1)
            return
    raise FileError(f"the graph holds a condition on its extents that is none: {str(condition)[:80]}.")


_SYMBOLIC: Mapping[str, str] = {  # torch.export's functions by the name of their class
    **dict.fromkeys(("Add", "Mul", "Mod", "Max", "Min", "And", "Or", "Not"), ""),
    "FloorDiv": "floordiv", "CleanDiv": "floordiv", "PythonMod": "mod", "Equality": "eq", "Unequality": "ne",
    "StrictLessThan": "lt", "LessThan": "le",
}  # fmt: skip


def of_symbols(expression: Any, numbers: Mapping[Any, int]) -> Any:
    """An expression of torch.export as a condition.

    Args:
        expression: of sympy.
        numbers: what its symbols are called here.

    Raises:
        LookupError: it has another symbol, or a function that no condition has.
    """
    kind = type(expression).__name__
    if kind in ("BooleanTrue", "BooleanFalse"):
        return int(bool(expression))
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return {"extent": numbers[expression]}
    if kind in ("StrictGreaterThan", "GreaterThan"):
        return of_symbols(expression.reversed, numbers)
    if kind in ("TruncToInt", "FloorToInt") and type(expression.args[0]).__name__ == "IntTrueDiv":
        return ["floordiv", *(of_symbols(each, numbers) for each in expression.args[0].args)]
    if kind in ("Pow", "PowByNatural") and expression.args[1].is_Integer and 0 < expression.args[1] < 5:
        return ["mul", *[of_symbols(expression.args[0], numbers)] * int(expression.args[1])]
    return [_SYMBOLIC[kind] or kind.lower(), *(of_symbols(each, numbers) for each in expression.args)]


def examples(inputs: Sequence[Input]) -> dict[int, int]:
    """The extents that the examples have."""
    return {number: each.shape[axis] for each in inputs for axis, number in each.free_axes.items()}


def check_shapes(inputs: Sequence[Input], conditions: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises AutopruneError unless inputs of these shapes are among those that a graph takes."""
    if len(shapes) != len(inputs):
        raise AutopruneError(f"this model takes {len(inputs)} inputs, not {len(shapes)}.")
    found: dict[int, int] = {}
    first: dict[int, str] = {}
    for given, shape in zip(inputs, shapes, strict=True):
        numbers = given.free_axes
        fixed = [
            axis
            for axis, extent in enumerate(given.shape)
            if axis not in numbers and shape[axis : axis + 1] != (extent,)
        ]
        if len(shape) != len(given.shape) or fixed:
            raise AutopruneError(
                f"this program was made for an input {given.name!r} of shape {tuple(given.shape)}{_freedom(given)}, "
                f"not {tuple(shape)}."
            )
        for axis, number in numbers.items():
            if found.setdefault(number, shape[axis]) != shape[axis]:
                what = "batch sizes" if number == 0 else "extents"
                raise AutopruneError(
                    f"the inputs' {what} differ: {sorted((found[number], shape[axis]))}. Axis {axis} of {given.name!r} "
                    f"and {first[number]} have one extent."
                )
            first.setdefault(number, f"axis {axis} of {given.name!r}")
    if asked := dict.fromkeys(told(each, first) for each in conditions if not holds(each, found)):
        raise AutopruneError(
            f"this program takes no inputs of shapes {list(shapes)}: of the extents that a call may choose, the model "
            f"asks that {' and '.join(asked)}. Repack it for these shapes."
        )


def _freedom(given: Input) -> str:
    """What a call may change of an input's shape."""
    axes = list(given.free_axes)
    if not axes:
        return ""
    return " (any batch size)" if given.free_axes == {0: 0} else f" (any extent of axis {', '.join(map(str, axes))})"


def choose(
    own: Mapping[int, int],
    conditions: Sequence[Any],
    candidates: Callable[[int], Iterable[int]],
    taken: Collection[int],
) -> dict[int, int]:
    """Extents that differ from each other and from those `taken`; an example's own where no candidate will do."""
    found, changed = dict(own), set[int]()

    def fits(chosen: Mapping[int, int]) -> bool:
        unlike = not any(extent in taken or extent in found.values() for extent in chosen.values())
        return unlike and all(holds(each, {**found, **chosen}) for each in conditions)

    for number in sorted(own):
        alike = [each for each in own if own[each] == own[number] and each not in changed]
        for together in ([number], alike) if number not in changed else ():  # the conditions may ask for equal ones
            tried = (dict.fromkeys(together, extent) for extent in candidates(number))
            if chosen := next(filter(fits, tried), None):
                found |= chosen
                changed |= chosen.keys()
                break
    return found


def with_extents(inputs: Sequence[Input], chosen: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the inputs where their free extents are those `chosen`."""
    return tuple(
        tuple(chosen.get(each.free_axes.get(axis, -1), extent) for axis, extent in enumerate(each.shape))
        for each in inputs
    )
