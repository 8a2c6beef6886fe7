"""A model as a small graph: named values, the operations of `ops`, weights beside it. It is what our files hold.

Everything in it but the weights is plain JSON, so a graph that comes from a file is data that `schema.validate` checks,
never code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from autoprune.repack.graph.ops import Op, Values
from autoprune.repack.graph.record import Record

FOLD_LIMIT = 1 << 16  # elements that a constant may have which is computed from smaller ones


@dataclass(frozen=True)
class Input:
    """A tensor the model is called with.

    Attributes:
        shape: of the example.
        dtype: e.g. ``float32``.
        free: for each axis: None where its extent is fixed, else the number of the extent it has, which a call may
            choose: axes of one number, in all inputs, have one extent. 0 is the batch's. Axes behind the last free one
            are left out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    free: tuple[int | None, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether the first axis is the batch's."""
        return self.free[:1] == (0,)

    @property
    def free_axes(self) -> dict[int, int]:
        """Free axis -> number of its extent."""
        return {axis: number for axis, number in enumerate(self.free) if number is not None}


@dataclass(frozen=True, eq=False)
class Graph:
    """Operations in the order they run.

    Attributes:
        outputs: what the model returns: the name of a value, a plain number, None, a ``{"text": ...}``, or one of
            ``{"tuple": [...]}``, ``{"list": [...]}`` and, of pairs, ``{"dict": [[key, ...], ...]}``, ``ordered`` (an
            OrderedDict) and ``record`` (a named tuple or dataclass) holding more of them.
        constants: weights, by name; names of values and of constants do not overlap.
        conditions: what the free extents must satisfy; see `extents`.
    """

    inputs: tuple[Input, ...]
    ops: tuple[Op, ...]
    outputs: Any
    constants: Mapping[str, Tensor]
    conditions: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """An operation a line, with its weights' shapes and attributes."""
        lines = [f"{each.name}: {each.dtype}{list(each.shape)}, free {each.free_axes}" for each in self.inputs]
        lines += [f"where {condition}" for condition in self.conditions]
        for op in self.ops:
            weights = [f"{role}: {list(self.constants[name].shape)}" for role, name in op.tensors.items()]
            about = [f"{key}={value}" for key, value in op.attributes.items()]
            lines.append(f"{op.output} = {op.kind}({', '.join([*op.inputs, *weights, *about])})")
        return "\n".join([*lines, f"returns {self.outputs}"])

    @property
    def dynamic(self) -> bool:
        """Whether a call may have other extents than the example."""
        return any(each.free_axes for each in self.inputs)

    def producers(self) -> dict[str, Op]:
        """Value -> the operation that defines it; the model's inputs have none."""
        return {op.output: op for op in self.ops}

    def consumers(self) -> dict[str, list[Op]]:
        """Value -> the operations that read it, each once. What is returned is in `output_names`."""
        readers: dict[str, list[Op]] = {each.name: [] for each in self.inputs}
        readers |= {op.output: [] for op in self.ops}
        for op in self.ops:
            for name in op.reads:
                readers.setdefault(name, []).append(op)
        return readers

    def packed_weights(self, layers: Collection[str]) -> set[str]:
        """The constants that nothing reads but the layers with these outputs, as their weight."""
        weights, read = set(), set(self.output_names())
        for op in self.ops:
            packed = {"weight"} if op.output in layers else set()
            weights |= {op.tensors[role] for role in packed}
            read |= {*op.reads, *(name for role, name in op.tensors.items() if role not in packed)}
        return weights - read

    def output_names(self) -> list[str]:
        """The values the model returns, in order."""
        return list(structure_names(self.outputs))

    def rebound(self, model: nn.Module) -> Graph | None:
        """The same graph with the weights of `model`, which has the architecture it was captured from.

        None when the graph holds a constant that is no parameter or buffer of that name and shape.
        """
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        constants = {}
        for name, old in self.constants.items():
            new = held.get(name)
            if new is None or new.shape != old.shape or new.dtype != old.dtype:
                return None
            constants[name] = new.detach().contiguous()
        return replace(self, constants=constants)


def build_outputs(outputs: Any, values: Values) -> Any:
    """What the model returns: the structure `outputs` of a graph with `values` in place of their names."""
    if isinstance(outputs, str):
        return values[outputs]
    if not isinstance(outputs, dict):
        return outputs
    ((tag, content),) = outputs.items()
    if tag == "text":
        return content
    if tag in ("tuple", "list"):
        rebuilt = [build_outputs(each, values) for each in content]
        return tuple(rebuilt) if tag == "tuple" else rebuilt
    pairs = {key: build_outputs(each, values) for key, each in content}
    return {"dict": dict, "ordered": OrderedDict, "record": Record}[tag](pairs)


def renamed(outputs: Any, names: Mapping[str, Any]) -> Any:
    """The structure `outputs` with other names of values, or other plain data in their places."""
    if isinstance(outputs, str):
        return names[outputs]
    if not isinstance(outputs, dict):
        return outputs
    ((tag, content),) = outputs.items()
    if tag in ("tuple", "list"):
        return {tag: [renamed(each, names) for each in content]}
    return {tag: content if tag == "text" else [[key, renamed(each, names)] for key, each in content]}


def structure_names(outputs: Any) -> Iterator[str]:
    """The names of values in the structure `outputs`, in order."""
    if isinstance(outputs, str):
        yield outputs
    elif isinstance(outputs, dict):
        ((tag, content),) = outputs.items()
        for each in () if tag == "text" else content:
            yield from structure_names(each if tag in ("tuple", "list") else each[1])
