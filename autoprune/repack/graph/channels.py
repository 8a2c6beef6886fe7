"""Dead channels: finding those whose removal changes nothing, and removing them from every weight they touch.

Values whose channels are the same ones, because what lies between them works on each channel by itself (activation,
pooling, depthwise convolution) or adds them up, form a bundle. A bundle that nothing but layers write and read may lose
a channel when each of its readers has zeros for it, or gets a constant there that the reader's bias can take over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoprune.repack.graph.editor import Editor, infer_shapes
from autoprune.repack.graph.ir import Op
from autoprune.repack.graph.reference import activate
from autoprune.repack.weights.grouping import Grouping

WORTH_BREAKING = 0.75  # smaller groups, slower by themselves, must store less than this share


@dataclass(frozen=True)
class _Axis:
    """The channels of one value.

    Attributes:
        is_map: whether they lie on axis 1 of four; on the last axis otherwise.
        span: features of one channel on the last axis: more than one where a map was flattened.
        constant: ``(channels,)``: what a channel holds everywhere, NaN where it varies.
    """

    is_map: bool
    span: int
    constant: Tensor

    def fits(self, other: _Axis) -> bool:
        return (self.is_map, self.span, len(self.constant)) == (other.is_map, other.span, len(other.constant))


def drop_dead_channels(edited: Editor) -> bool:
    """Removes what can be removed in one look at the graph; returns whether there was any."""
    look = _Look(edited)
    dead = {root: found for root in look.closed() if (found := look.dead(root)) is not None}
    for root, channels in dead.items():
        look.remove(root, channels)
    edited.prune()
    if dead:
        edited.shapes = infer_shapes(edited.graph())
    return bool(dead)


def sole_readers(edited: Editor) -> dict[str, str]:
    """Layer -> the layer that alone reads its channels, each by the value it defines.

    Such a layer need not compute what that one has zeros for. Several may share a reader that reads their sum; a layer
    behind a flattened map, where a channel is several features, has no place here.
    """
    look = _Look(edited)
    readers: dict[str, list[str]] = {}
    for name in look.readers:
        readers.setdefault(look.root(edited.ops[name].inputs[0]), []).append(name)
    alone = {root: readers[root][0] for root in look.closed() if len(readers.get(root, ())) == 1}
    alone = {root: name for root, name in alone.items() if look.axes[edited.ops[name].inputs[0]].span == 1}
    layers = [name for name, op in edited.ops.items() if op.kind in ("conv2d", "linear") and name in look.axes]
    return {name: alone[root] for name in layers if (root := look.root(name)) in alone}


class _Look:
    """One look at a graph: the bundles, who writes and reads them, which channels are constant."""

    def __init__(self, edited: Editor) -> None:
        self.edited = edited
        self.axes: dict[str, _Axis] = {}
        self.parent: dict[str, str] = {}
        self.barred = {each.name for each in edited.inputs} | edited.returned
        self.writers: list[str] = []  # layers, by what they define
        self.readers: list[str] = []
        for op in edited.ops.values():
            _RULES.get(op.kind, _bar)(self, op)

    def root(self, name: str) -> str:
        while name in self.parent:
            name = self.parent[name]
        return name

    def tie(self, op: Op, axis: _Axis, *sources: str) -> None:
        """Gives the output of `op` an axis, whose channels are those of `sources`."""
        self.axes[op.output] = axis
        for name in sources:
            if self.root(name) != self.root(op.output):
                self.parent[self.root(name)] = self.root(op.output)

    def closed(self) -> set[str]:
        """The bundles that may be touched, each by its root."""
        return {self.root(name) for name in self.axes} - {self.root(name) for name in self.barred}

    def dead(self, root: str) -> Tensor | None:
        """Marks the channels to remove; None when there are none."""
        readers = [self.edited.ops[name] for name in self.readers if self.root(self.edited.ops[name].inputs[0]) == root]
        if not readers:
            return None
        dead = torch.stack([self.unneeded(op) for op in readers]).all(dim=0)
        before = None
        while before is None or not torch.equal(before, dead):
            before = dead.clone()
            for name in self.writers:
                if self.root(name) == root:
                    dead = _whole_groups(self.edited.weight(self.edited.ops[name], "weight"), dead)
        if dead.all():
            dead[0] = False  # no layer is without channels
        return dead if dead.any() else None

    def unneeded(self, op: Op) -> Tensor:
        """The channels that one reader can do without."""
        axis = self.axes[op.inputs[0]]
        unread = ~self.by_channel(op).any(dim=2).any(dim=0)
        movable = ~axis.constant.isnan() if not any(op.attributes.get("padding", ())) else axis.constant == 0
        return unread | movable

    def by_channel(self, op: Op) -> Tensor:
        """A reader's weight as (filters, channels, the rest)."""
        weight = self.edited.weight(op, "weight")
        return weight.reshape(len(weight), len(self.axes[op.inputs[0]].constant), -1)

    def remove(self, root: str, dead: Tensor) -> None:
        keep = (~dead).nonzero().flatten()
        ops = self.edited.ops
        for name in [name for name in self.readers if self.root(ops[name].inputs[0]) == root]:
            ops[name] = self.narrowed(ops[name], dead)
        for name, op in list(ops.items()):
            if name not in self.axes or self.root(name) != root:
                continue
            if op.tensors:
                rows = {role: value[keep] for role, value in self.edited.weights(op).items()}
                op = self.edited.with_weights(op, **rows)
            if op.attributes.get("groups", 1) > 1:
                op = op.with_attributes(groups=len(keep))
            if op.kind == "reshape" and op.attributes["shape"][-1] != -1:
                op = op.with_attributes(shape=[*op.attributes["shape"][:-1], len(keep) * self.axes[name].span])
            ops[name] = op

    def narrowed(self, op: Op, dead: Tensor) -> Op:
        """A reader without its dead inputs; what they held goes into its bias."""
        weight, spread = self.edited.weight(op, "weight"), self.by_channel(op)
        held = self.axes[op.inputs[0]].constant[dead].double().nan_to_num()
        moved = (spread[:, dead].double().sum(dim=2) @ held).to(weight.dtype)
        kept = spread[:, ~dead].reshape(len(weight), -1, *weight.shape[2:])
        if not moved.any():
            return self.edited.with_weights(op, weight=kept)
        bias = self.edited.weight(op, "bias") + moved if "bias" in op.tensors else moved
        return self.edited.with_weights(op, weight=kept, bias=bias)


def _whole_groups(weight: Tensor, dead: Tensor) -> Tensor:
    """Spares filters whose loss would break up groups that share their zeros, unless what is left packs far smaller."""
    live = weight.flatten(1).any(dim=1)
    if not (dead & live).any() or weight[live].all():
        return dead
    spared = dead.clone()
    grouping = Grouping(weight)
    for rows in grouping.rows(grouping.best_size()):
        group = torch.from_numpy(rows[rows >= 0]).long()
        spared[group] = dead[group].all()
    if torch.equal(spared, dead):
        return dead
    return dead if _stored(weight[~dead]) < WORTH_BREAKING * _stored(weight[~spared]) else spared


def _stored(weight: Tensor) -> float:
    """Values that are stored of a weight, in the largest groups it allows."""
    if not len(weight):
        return 0.0
    grouping = Grouping(weight)
    return grouping.density(grouping.best_size()) * weight.numel()


# What each kind does to channels ------------------------------------------------------------------------------------


def _bar(look: _Look, op: Op) -> None:
    """Whatever works on whole tensors needs every channel of them."""
    if op.kind != "scalar":  # those read extents that depend on the batch
        look.barred.update((op.output, *op.inputs))


def _layer(look: _Look, op: Op) -> None:
    if op.attributes.get("groups", 1) > 1:
        _depthwise(look, op)
        return
    is_map = op.kind == "conv2d"
    weight = look.edited.weight(op, "weight")
    read = look.axes.get(op.inputs[0])
    if read is None or read.is_map != is_map:
        look.barred.add(op.inputs[0])
    else:
        look.readers.append(op.output)
    varies = weight.flatten(1).any(dim=1)
    look.writers.append(op.output)
    _finish(look, op, _Axis(is_map, 1, _bias(look, op).masked_fill(varies, math.nan)), op.inputs[1:])


def _depthwise(look: _Look, op: Op) -> None:
    """Each channel is filtered by itself; padding shows unless the channel is zero."""
    weight = look.edited.weight(op, "weight")
    axis = look.axes.get(op.inputs[0])
    if axis is None or not axis.is_map or weight.shape[1] != 1 or op.attributes["groups"] != len(weight):
        _bar(look, op)
        return
    total = weight.flatten(1).sum(dim=1)
    silent = ~weight.flatten(1).any(dim=1) | (axis.constant == 0)
    constant = axis.constant * (math.nan if any(op.attributes["padding"]) else total)
    constant = constant.masked_fill(silent, 0.0) + _bias(look, op)
    _finish(look, op, replace(axis, constant=constant), op.inputs[1:], op.inputs[0])


def _bias(look: _Look, op: Op) -> Tensor:
    weights = look.edited.weights(op)
    return weights.get("bias", torch.zeros(len(weights["weight"]), dtype=weights["weight"].dtype))


def _finish(look: _Look, op: Op, axis: _Axis, residual: tuple[str, ...], *tied: str) -> None:
    """Adds the residual and applies the activation of a layer."""
    constant = axis.constant
    for name in residual:
        other = look.axes.get(name)
        if other is None or not other.fits(axis):
            look.axes[op.output] = axis
            look.barred.update((op.output, name))
        else:
            constant = constant + other.constant
    look.tie(op, replace(axis, constant=_activated(constant, op.activation)), *tied, *residual)


def _activated(constant: Tensor, name: str | None) -> Tensor:
    return activate(constant.nan_to_num(), name).masked_fill(constant.isnan(), math.nan)


def _elementwise(look: _Look, op: Op) -> None:
    axes = [look.axes.get(name) for name in op.inputs]
    first = axes[0]
    if first is None or not all(axis is not None and axis.fits(first) for axis in axes):
        _bar(look, op)
        return
    constant = torch.stack([axis.constant for axis in axes if axis is not None]).sum(dim=0)
    name = op.attributes["name"] if op.kind == "activation" else op.activation
    look.tie(op, replace(first, constant=_activated(constant, name)), *op.inputs)


def _pool(look: _Look, op: Op) -> None:
    """A window over a constant gives the constant, unless it averages zeros of the border in."""
    axis = look.axes.get(op.inputs[0])
    if axis is None or not axis.is_map:
        _bar(look, op)
        return
    constant = axis.constant
    if any(op.attributes.get("padding", ())) and op.attributes.get("count_include_pad", False):
        constant = constant.masked_fill(constant != 0, math.nan)
    look.tie(op, replace(axis, constant=constant), *op.inputs)


def _global_avg_pool(look: _Look, op: Op) -> None:
    axis = look.axes.get(op.inputs[0])
    if axis is None or not axis.is_map:
        _bar(look, op)
        return
    look.tie(op, replace(axis, is_map=bool(op.attributes["keepdim"])), *op.inputs)


def _reshape(look: _Look, op: Op) -> None:
    """Flattening a map, or joining axes before the last."""
    axis = look.axes.get(op.inputs[0])
    before, after = look.edited.shapes[op.inputs[0]], look.edited.shapes[op.output]
    flat = axis is not None and axis.is_map and after == (before[0], math.prod(before[1:]))
    same = (
        axis is not None and not axis.is_map and after[-1:] == before[-1:] and type(op.attributes["shape"][-1]) is int
    )
    if axis is None or not (flat or same):
        _bar(look, op)
        return
    look.tie(op, replace(axis, is_map=False, span=math.prod(before[2:])) if flat else axis, *op.inputs)


_RULES: Mapping[str, Callable[[_Look, Op], None]] = {
    "conv2d": _layer,
    "linear": _layer,
    "activation": _elementwise,
    "add": _elementwise,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _pool,
    "global_avg_pool": _global_avg_pool,
    "reshape": _reshape,
}
