"""What torch.export found out about the extents of a model's inputs, as a graph tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from autoprune.repack.graph import aten, extents
from autoprune.repack.graph.ir import Input
from autoprune.repack.graph.torch_export import CaptureError


class Extents:
    """The free extents of an exported program, numbered; 0 is that of the first input's first axis.

    Args:
        nodes: that stand for the inputs.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.environment: Any = None
        self.numbers: dict[Any, int] = {}  # sympy's expression of an extent -> number
        self.axes: list[dict[int, int]] = []  # of each input: axis -> number
        for node in nodes:
            value = node.meta["val"]
            self.axes.append(dict(self._numbered(value)) if isinstance(value, Tensor) else {})

    def _numbered(self, value: Tensor) -> Iterator[tuple[int, int]]:
        for axis, extent in enumerate(value.shape):
            if (node := getattr(extent, "node", None)) is not None:  # symbolic
                self.environment = node.shape_env
                expression = self.environment.replace(node.expr)
                if not expression.is_Integer:  # torch fixed it later
                    first = not self.axes and axis == 0
                    after = max(self.numbers.values(), default=0) + 1
                    yield axis, self.numbers.setdefault(expression, 0 if first else after)

    def described(self, inputs: Sequence[Tensor], names: Sequence[str]) -> Iterator[Input]:
        """The inputs of a graph; raises CaptureError for one of a type that none has."""
        for name, x, numbers in zip(names, inputs, self.axes, strict=True):
            try:
                dtype = aten.encode_dtype(x.dtype)
            except KeyError:
                raise CaptureError(f"an input of type {x.dtype} is not supported.") from None
            free = tuple(numbers.get(axis) for axis in range(max(numbers, default=-1) + 1))
            yield Input(name, tuple(x.shape), dtype, free)

    def written(self, expression: Any) -> Any:
        """An extent, or what is known about some, as `extents` writes it; raises CaptureError where it cannot."""
        expression = getattr(getattr(expression, "node", None), "expr", expression)
        if isinstance(expression, (bool, int)):
            return int(expression)
        expression = self.environment.replace(expression)
        try:
            return extents.of_symbols(expression, self.numbers)
        except LookupError as error:
            raise CaptureError(
                f"the model depends on its inputs' extents by {error}, which a program cannot."
            ) from None

    def conditions(self, inputs: Sequence[Input], asserted: Sequence[Any] = ()) -> tuple[Any, ...]:
        """What the extents must satisfy.

        Args:
            inputs: as `described`.
            asserted: conditions that stand in the graph.

        Raises:
            CaptureError: a condition that cannot be written, or that the examples do not satisfy.
        """
        if self.environment is None:
            return ()
        found = [self.written(each) for each in (*asserted, *(guard.expr for guard in self.environment.guards))]
        for expression, number in self.numbers.items():
            if not expression.is_Symbol:
                found.append(["eq", {"extent": number}, self.written(expression)])
        own, kept = extents.examples(inputs), []
        for each in found:
            if isinstance(each, list) and extents.holds(each, own):
                kept.append(each)
            elif not (each == 1 or (isinstance(each, list) and each[0] == "ne")):  # torch tells extents of 1 apart
                raise CaptureError("the model takes another way for larger inputs than for the examples.")
        return tuple(kept)

    def pinned(self) -> set[int]:
        """The numbers of extents that together have one value: torch lets them vary, which is of no use."""
        guards = () if self.environment is None else self.environment.guards
        written = [self.written(guard.expr) for guard in guards]
        equalities = [each for each in written if isinstance(each, list) and each[0] == "eq"]
        return {
            number
            for each in equalities
            if any(isinstance(side, int) for side in each[1:])
            and not any(isinstance(side, list) and side[0] == "mod" for side in each[1:])
            for number in extents.numbers_in(each)
        }
