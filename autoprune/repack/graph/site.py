"""Where an operator of torch.export is called: what a lifting sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from autoprune.model.weights import layer_name
from autoprune.repack.graph.calls import in_model
from autoprune.repack.graph.integers import Integers
from autoprune.repack.graph.ops import Op

Node = fx.Node


@dataclass(frozen=True)
class Alias:
    """An operator that does nothing: its result is the value called `name`."""

    name: str


class Context(Protocol):
    """What a lifting needs of the translation it is part of."""

    names: dict[Node, str]
    constants: dict[str, Tensor]
    program: torch.export.ExportedProgram
    integers: Integers

    def constant(self, name: str, value: Tensor) -> str: ...


@dataclass(frozen=True)
class Site:
    """One call of an operator: the node, and its arguments by name."""

    context: Context
    node: Node
    args: Mapping[str, Any]

    @property
    def output(self) -> str:
        """The name of what it computes."""
        return self.node.name

    @property
    def result(self) -> Node | None:
        """The node of its result; of several results the first's, or None where another is read, or none."""
        if isinstance(self.node.meta["val"], Tensor):
            return self.node
        read = [user for user in self.node.users if user.users]
        return read[0] if len(read) == 1 and read[0].args[1] == 0 else None

    def name(self, argument: str) -> str:
        return self.context.names[self.args[argument]]

    def is_value(self, argument: str, axes: int | None = None) -> bool:
        """Whether an argument is a float32 tensor that is computed, of so many axes."""
        node: Any = self.args.get(argument)
        return self.is_float(node, axes) and self.context.names[node] not in self.context.constants

    def is_weight(self, argument: str, axes: int) -> bool:
        """Whether an argument is a float32 constant of so many axes."""
        node: Any = self.args.get(argument)
        return self.is_float(node, axes) and self.context.names[node] in self.context.constants

    def is_float(self, node: Any, axes: int | None) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return isinstance(value, Tensor) and value.dtype == torch.float32 and axes in (None, value.ndim)

    def shape(self, argument: str) -> tuple[int | str, ...]:
        """Extents; those that depend on the batch as text, so that equal ones compare equal."""
        return extents(self.args[argument])

    def weights(self, **arguments: str) -> dict[str, str] | None:
        """Role -> constant for the arguments that are given; None when one is computed."""
        found = {}
        for role, argument in arguments.items():
            if self.args[argument] is None:
                continue
            if not self.is_weight(argument, len(self.shape(argument))):
                return None
            found[role] = self.name(argument)
        return found

    def layer(self, argument: str = "weight") -> str:
        """The layer whose weight this is: by the parameter's first name, or, of a computed weight, by the module."""
        held, name = self.context.program.state_dict, self.name(argument)
        weight = held.get(f"model.{name}")
        if weight is not None:
            first = next(path for path, each in held.items() if each is weight)
            return layer_name(in_model(first))
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        start = f"{path}.weight"  # and weight_v, weight_orig: what the weight is computed from
        if any(key == start or key.startswith(f"{start}_") for key in held):
            return in_model(path)
        return layer_name(self._computed_from(argument) or name)

    def _computed_from(self, argument: str) -> str | None:
        """The parameter of the same extents that a constant was computed from, where it is one alone."""
        parameters = self.context.program.graph_signature.inputs_to_parameters
        found, seen, left = set(), set(), [self.args[argument]]
        while left:
            node = left.pop()
            seen.add(node)
            if node.name in parameters and extents(node) == self.shape(argument):
                found.add(in_model(parameters[node.name]))
            left += [each for each in node.all_input_nodes if each not in seen]
        return found.pop() if len(found) == 1 else None


Result = Op | tuple[Op, ...] | Alias | None  # of several the last is the result


def extents(node: Node) -> tuple[int | str, ...]:
    """A node's shape, symbolic extents as text."""
    shape = (getattr(getattr(extent, "node", None), "expr", extent) for extent in node.meta["val"].shape)
    return tuple(
        extent if isinstance(extent, int) else int(extent) if extent.is_Integer else str(extent) for extent in shape
    )
