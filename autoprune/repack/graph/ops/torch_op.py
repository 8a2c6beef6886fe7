"""What torch runs itself: any operator of the allow-list in `aten`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph import aten
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import LARGEST, OptionalCount, Text, is_tuple
from autoprune.repack.graph.ops.base import Axes, BatchRule, Op, Shapes, Values


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


@dataclass(frozen=True, kw_only=True)
class TorchOp(Op):
    """A call of one of torch's operators.

    Attributes:
        inputs: what its arguments refer to, in order, each once.
        op: e.g. ``aten.softmax.int``.
        args: as JSON: see `aten.decode`.
        kwargs: likewise.
        item: which of its results it is, where it has several.
    """

    kind = "torch"
    operands = (0, LARGEST)

    op: Text
    args: Annotated[tuple[Any, ...], is_tuple]
    kwargs: Annotated[Mapping[str, Any], _is_mapping]
    item: OptionalCount = None

    @classmethod
    def of(cls, output: str, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> TorchOp:
        """With the inputs that its arguments refer to."""
        given = kwargs or {}
        return cls(output, _names(args, given), op=op, args=args, kwargs=given)

    @property
    def label(self) -> str:
        return self.op

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Any:
        return aten.call(self.op, self.args, self.kwargs, values, self.item)

    def bound(self, fixed: Values) -> Callable[[Values], Any]:
        """`evaluate` made ready for many calls on the CPU: values -> result, those of `fixed` the same in each."""
        return aten.bind(self.op, self.args, self.kwargs, self.item, fixed)

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        what = str(self)
        aten.check_encoded(self.args, what)
        for key, value in self.kwargs.items():
            if not isinstance(key, str):
                raise FileError(f"{what} holds the argument {key!r}.")
            aten.check_encoded(value, what)
        if self.inputs != _names(self.args, self.kwargs):
            raise FileError(f"{what} has the inputs {list(self.inputs)!r} for other arguments.")
        aten.check_arguments(self.op, self.args, self.kwargs, what)

    def with_input(self, old: str, new: str) -> Op:
        args = tuple(aten.renamed(self.args, old, new))
        kwargs = {key: aten.renamed(value, old, new) for key, value in self.kwargs.items()}
        return replace(self, inputs=_names(args, kwargs), args=args, kwargs=kwargs)

    def batch_rule(self) -> BatchRule | None:
        rule = _BATCH_RULES.get(self.op)
        if rule is None and torch.Tag.pointwise in aten.resolve(self.op).tags:
            return batch_rules.aligned
        return rule

    def named_args(self) -> dict[str, Any]:
        """Its arguments by name, without those it leaves out."""
        arguments = aten.resolve(self.op)._schema.arguments
        named = dict(zip((argument.name for argument in arguments), self.args, strict=False))
        return named | dict(self.kwargs)


def _names(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(aten.references([args, list(kwargs.values())])))


def _beside(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """It works along some axes, which its argument `dim`, or `dims`, tells: not the batch's."""
    assert isinstance(op, TorchOp)
    arguments = aten.resolve(op.op)._schema.arguments
    default = next((each.default_value for each in arguments if each.name == "dim"), None)
    named = op.named_args()
    dims = named["dims"] if "dims" in named else named.get("dim", default)
    if dims is None or dims == []:
        return False
    dims = dims if isinstance(dims, list) else [dims]
    given = [name for name in op.reads if name in axes]
    return all(
        axes[name] is not None and type(dim) is int and dim % len(shapes[name]) != axes[name]
        for name in given for dim in dims
    )  # fmt: skip


def _looked_up(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """Rows of a table: the samples are those of the numbers."""
    assert isinstance(op, TorchOp)
    return axes[op.args[1]["ref"]] == axis


def _sample_by_sample(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """The batch comes first; weights are the same for all samples."""
    first, *weights = op.inputs
    return axis == 0 and axes[first] == 0 and all(axes.get(name) is None for name in weights)


def _stacked(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """Values beside each other along a new axis, which is not the batch's."""
    assert isinstance(op, TorchOp)
    new = op.named_args().get("dim", 0) % len(shapes[op.output])
    return new != axis and all(axes[name] == axis - (new < axis) for name in op.inputs)


_BATCH_RULES: Mapping[str, BatchRule] = {
    **dict.fromkeys(
        (
            "aten.transpose.int", "aten.permute.default", "aten.unsqueeze.default", "aten.movedim.int",
            "aten.t.default",
        ),
        batch_rules.moved,
    ),
    **dict.fromkeys(
        (
            "aten.select.int", "aten.slice.Tensor", "aten.unbind.int", "aten.split.Tensor", "aten.cat.default",
            "aten.split_with_sizes.default", "aten.chunk.default", "aten.mean.dim", "aten.sum.dim_IntList",
            "aten.amax.default", "aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int",
            "aten.squeeze.dim", "aten.squeeze.dims", "aten.roll.default", "aten.flip.default", "aten.amin.default",
            "aten.linalg_vector_norm.default", "aten.cumsum.default", "aten.argmax.default", "aten.argmin.default",
        ),
        _beside,
    ),
    **dict.fromkeys(
        (
            "aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int",
            "aten._unsafe_view.default",
        ),
        batch_rules.refolded,
    ),
    **dict.fromkeys(("aten.matmul.default", "aten.bmm.default"), batch_rules.outer),
    "aten.stack.default": _stacked,
    **dict.fromkeys(
        (
            "aten.group_norm.default", "aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec",
            "aten.adaptive_max_pool2d.default",
        ),
        _sample_by_sample,
    ),
    "aten.embedding.default": _looked_up,
    "aten.expand.default": batch_rules.repeated,
    "aten.clone.default": batch_rules.aligned,
    "aten.contiguous.default": batch_rules.aligned,
    "aten.dropout.default": batch_rules.aligned,
}  # fmt: skip
