"""Integers that are computed of extents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.ops.attributes import LARGEST, integer, is_text, one_of
from autoprune.repack.graph.ops.base import Op, Values

SCALARS: Mapping[str, Callable[[Any, Any], Any]] = {  # of integers, symbolic ones while torch.export traces
    "size": lambda x, axis: x.shape[axis],
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": lambda a, b: max(a, b),
    "min": lambda a, b: min(a, b),
}


def _are_args(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(is_text(x) or integer(-LARGEST)(x) for x in value)


@dataclass(frozen=True, kw_only=True)
class Scalar(Op):
    """An integer of two arguments.

    Attributes:
        inputs: the names among `args`, each once.
        fn: a name of `SCALARS`.
        args: integers, and names of values: of a tensor and an axis for ``size``, else of integers.
    """

    kind = "scalar"
    operands = (0, 2)

    fn: Annotated[str, one_of(SCALARS)]
    args: Annotated[tuple[int | str, ...], _are_args]

    @classmethod
    def of(cls, output: str, fn: str, args: tuple[int | str, ...]) -> Scalar:
        """With the inputs that its arguments name."""
        return cls(output, _names(args), fn=fn, args=args)

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Any:
        a, b = (values[each] if isinstance(each, str) else each for each in self.args)
        return SCALARS[self.fn](a, b)

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        if self.fn == "size" and not (is_text(self.args[0]) and type(self.args[1]) is int):
            raise FileError(f"{self} takes the size of {list(self.args)!r}.")
        if self.inputs != _names(self.args):
            raise FileError(f"{self} has the inputs {list(self.inputs)!r} for the arguments {list(self.args)!r}.")

    def with_input(self, old: str, new: str) -> Op:
        args = tuple(new if arg == old else arg for arg in self.args)
        return replace(self, inputs=_names(args), args=args)

    def tie_channels(self, bundles: Bundles) -> None:
        """It reads extents that depend on the batch, and no channels."""


def _names(args: tuple[int | str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each for each in args if isinstance(each, str)))
