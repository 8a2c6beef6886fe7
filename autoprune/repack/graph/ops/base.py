"""What every operation has: names of what it reads and defines, attributes, and the rules that give it a meaning."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self, get_origin, get_type_hints

from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.bundles import Bundles, ChannelAxis
from autoprune.repack.graph.ops.attributes import Check, Key

Values = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Axes = Mapping[str, int | None]
Roles = Mapping[str, tuple[int, bool]]


@dataclass(frozen=True)
class Op(ABC):
    """One operation.

    A class of operations adds its attributes as fields, with the types of `attributes`. One with a default may be
    missing in files, and is left out of them where it has its default.

    Attributes:
        kind: the name of the class in files: a key of `OPS`.
        operands: how many inputs it has at least and at most.
        roles: of its weights -> (axes, whether it must be there).
        picks: whether its output holds nothing but values of its input, and so lies on the grid that they lie on.
        output: the value it defines: one tensor, or an integer of `Scalar`.
        inputs: the values it works on.
        tensors: its weights: role -> name of a constant.
    """

    kind: ClassVar[str]
    operands: ClassVar[tuple[int, int]] = (1, 1)
    roles: ClassVar[Roles] = {}
    picks: ClassVar[bool] = False

    output: str
    inputs: tuple[str, ...]
    tensors: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Any:
        """The output by torch's own functions; works on meta tensors too.

        Args:
            x: the inputs.
            w: the weights, by role.
            values: every value so far, and the constants.
        """

    def check(self, constants: Mapping[str, Tensor]) -> None:
        """Raises FileError unless inputs, attributes and weights are such as the class takes, and fit each other."""
        low, high = self.operands
        if not all(isinstance(name, str) for name in self.inputs) or not low <= len(self.inputs) <= high:
            raise FileError(f"{self} has the inputs {list(self.inputs)!r}.")
        for key, attribute in attributes_of(type(self)).items():
            value = getattr(self, attribute.field)
            if not attribute.check(value):
                raise FileError(f"{self} has {key} = {_as_json(value)!r}.")
        self._check_tensors(constants)

    def batch_rule(self) -> BatchRule | None:
        """How it treats the samples of a batch; None where it is not known to keep them apart."""
        return None

    def tie_channels(self, bundles: Bundles) -> None:
        """Tells which channels its output shares with its inputs; by default it needs every channel of them."""
        bundles.bar(self.output, *self.inputs)

    def with_channels(self, left: int, axis: ChannelAxis) -> Op:
        """The operation once `left` channels are there of its output's `axis`; its weights are cut by then."""
        return self

    def with_input(self, old: str, new: str) -> Op:
        """The operation that reads the value `new` where it read `old`."""
        return replace(self, inputs=tuple(new if name == old else name for name in self.inputs))

    @property
    def reads(self) -> tuple[str, ...]:
        """Every name it depends on but its weights, each once."""
        return tuple(dict.fromkeys(self.inputs))

    @property
    def last_activation(self) -> str | None:
        """The activation that its output went through last; None without one."""
        return None

    @property
    def label(self) -> str:
        """What it is called in listings."""
        return self.kind

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes as they stand in a file: plain JSON."""
        known = attributes_of(type(self))
        given = {key: getattr(self, each.field) for key, each in known.items()}
        return {
            key: _as_json(value) for key, value in given.items() if known[key].needed or value != known[key].default
        }

    def __str__(self) -> str:
        """As errors name it."""
        return f"the operation {self.output!r} ({self.kind})"

    @classmethod
    def from_json(
        cls, output: str, inputs: tuple[str, ...], attributes: Mapping[str, Any], tensors: Mapping[str, str]
    ) -> Self:
        """The operation with a file's attributes, which `check` has yet to check; raises FileError for other names."""
        known = attributes_of(cls)
        missing = {key for key, each in known.items() if each.needed} - set(attributes)
        if missing or set(attributes) - set(known):
            names = f"the attributes {sorted(attributes)}; it takes {sorted(known)}"
            raise FileError(f"the operation {output!r} ({cls.kind}) has {names}.")
        for key, value in attributes.items():
            if value is None and known[key].default is None:  # it is left out then
                raise FileError(f"the operation {output!r} ({cls.kind}) has {key} = None.")
        fields = {known[key].field: tuple(v) if isinstance(v, list) else v for key, v in attributes.items()}
        return cls(output, inputs, tensors, **fields)

    def _check_tensors(self, constants: Mapping[str, Tensor]) -> None:
        missing = {role for role, (_, needed) in self.roles.items() if needed} - set(self.tensors)
        if missing or set(self.tensors) - set(self.roles):
            raise FileError(f"{self} has the weights {sorted(self.tensors)}; it takes {sorted(self.roles)}.")
        for role, name in self.tensors.items():
            if not isinstance(name, str) or name not in constants:
                raise FileError(f"{self} has the {role} {name!r}, which is missing.")
            tensor = constants[name]
            if tensor.ndim != self.roles[role][0] or not tensor.is_floating_point():
                raise FileError(f"{self} has a {role} of shape {tuple(tensor.shape)} and type {tensor.dtype}.")


BatchRule = Callable[[Op, Axes, Shapes, int], bool]
"""(operation, the batch's axis in every value, shapes, its axis in the output) -> whether samples stay apart."""


@dataclass(frozen=True)
class Attribute:
    """An attribute of a class of operations.

    Attributes:
        field: its name in the class.
        check: what it may be.
        default: what it is where a file does not give it; MISSING where a file must.
    """

    field: str
    check: Check
    default: Any

    @property
    def needed(self) -> bool:
        """Whether a file must give it."""
        return self.default is dataclasses.MISSING


@functools.cache
def attributes_of(cls: type[Op]) -> Mapping[str, Attribute]:
    """The attributes of a class, by their names in files."""
    hints = get_type_hints(cls, include_extras=True)
    common = {each.name for each in dataclasses.fields(Op)}
    found = {}
    for each in dataclasses.fields(cls):
        if each.name not in common:
            if get_origin(hints[each.name]) is not Annotated:
                raise TypeError(f"{cls.__name__}.{each.name} has no check: declare it with a type of `ops.attributes`.")
            check, *key = hints[each.name].__metadata__
            name = next((about.name for about in key if isinstance(about, Key)), each.name)
            found[name] = Attribute(each.name, check, each.default)
    return found


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
