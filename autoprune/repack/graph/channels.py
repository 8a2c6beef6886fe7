"""Channels that can be removed or reordered without changing what a graph computes.

Values whose channels are the same ones form a bundle (see `bundles`). A bundle that nothing but layers write and read
may have its channels in any order, and may lose one when each of its readers has zeros for it, or gets a constant there
that the reader's bias can take over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.editor import Editor, infer_shapes
from autoprune.repack.graph.ops import Conv2d, Linear, Op
from autoprune.repack.weights.grouping import Grouping

WORTH_BREAKING = 0.75  # smaller groups, slower by themselves, must store less than this share


def drop_dead_channels(edited: Editor) -> bool:
    """Removes what can be removed in one look at the graph; returns whether there was any."""
    look = Channels(edited)
    dead = {root: look.in_whole_groups(root, found) for root, found in look.dead().items()}
    return look.remove(dead)


def sole_readers(edited: Editor) -> dict[str, str]:
    """Layer -> the layer that alone reads its channels, each by the value it defines.

    Such a layer need not compute what that one has zeros for. Several may share a reader that reads their sum; a layer
    behind a flattened map, where a channel is several features, has no place here.
    """
    bundles = Channels(edited).bundles
    readers: dict[str, list[str]] = {}
    for name in bundles.readers:
        readers.setdefault(bundles.root(edited.ops[name].inputs[0]), []).append(name)
    alone = {root: readers[root][0] for root in bundles.closed() if len(readers.get(root, ())) == 1}
    alone = {root: name for root, name in alone.items() if bundles.axes[edited.ops[name].inputs[0]].span == 1}
    layers = [name for name, op in edited.ops.items() if isinstance(op, (Conv2d, Linear)) and name in bundles.axes]
    return {name: alone[root] for name in layers if (root := bundles.root(name)) in alone}


class Channels:
    """The channels of a graph as it stands: its bundles, and which of their channels are dead.

    Args:
        edited: the graph; `remove` changes it.
        whole: values that keep every channel -> why.

    Attributes:
        because: values that need every channel -> why, as the first to say so has it.
    """

    def __init__(self, edited: Editor, whole: Mapping[str, str] | None = None) -> None:
        self.edited, self.bundles = edited, Bundles(edited.shapes, edited.constants)
        self.because = {
            **{each.name: "they are the model's inputs" for each in edited.inputs},
            **dict.fromkeys(edited.returned, "the model returns them"),
            **(whole or {}),
        }
        self.bundles.bar(*self.because)
        for op in edited.ops.values():
            op.tie_channels(self.bundles)
            for name in (op.output, *op.inputs):
                if name in self.bundles.barred:
                    self.because.setdefault(name, f"{op.label} needs all of them")

    def readers_of(self, root: str) -> list[Op]:
        """The layers that multiply the channels of a bundle."""
        ops = [self.edited.ops[name] for name in self.bundles.readers]
        return [op for op in ops if self.bundles.root(op.inputs[0]) == root]

    def writers_of(self, root: str) -> list[Op]:
        """The layers whose filters are the channels of a bundle; depthwise convolutions are none."""
        return [self.edited.ops[name] for name in self.bundles.writers if self.bundles.root(name) == root]

    def dead(self) -> dict[str, Tensor]:
        """Bundles that may lose channels, each by its root -> which of them no reader needs."""
        readers = {root: self.readers_of(root) for root in self.bundles.closed()}
        return {root: torch.stack([self.unneeded(op) for op in ops]).all(dim=0) for root, ops in readers.items() if ops}

    def in_whole_groups(self, root: str, dead: Tensor) -> Tensor:
        """Those of the dead channels whose loss leaves groups of filters whole that share their zeros."""
        before = None
        while before is None or not torch.equal(before, dead):
            before = dead.clone()
            for op in self.writers_of(root):
                dead = _whole_groups(self.edited.weight(op, "weight"), dead)
        return dead

    def unneeded(self, op: Op) -> Tensor:
        """The channels that one reader can do without."""
        axis = self.bundles.axes[op.inputs[0]]
        unread = ~self.by_channel(op).any(dim=2).any(dim=0)
        padded = isinstance(op, Conv2d) and any(op.padding)
        movable = axis.constant == 0 if padded else ~axis.constant.isnan()
        return unread | movable

    def by_channel(self, op: Op) -> Tensor:
        """A reader's weight as (filters, channels, the rest)."""
        weight = self.edited.weight(op, "weight")
        return weight.reshape(len(weight), len(self.bundles.axes[op.inputs[0]].constant), -1)

    def remove(self, dead: Mapping[str, Tensor]) -> bool:
        """Removes dead channels of the graph, all but one of each bundle; returns whether there were any."""
        removable = {}
        for root, channels in dead.items():
            channels = channels.clone()
            if channels.all():
                channels[0] = False  # no layer is without channels
            if channels.any():
                removable[root] = channels
        for root, channels in removable.items():
            for op in self.readers_of(root):
                self.edited.ops[op.output] = self.without(op, channels)
            self.select(root, (~channels).nonzero().flatten())
        self.edited.prune()
        if removable:
            self.edited.shapes = infer_shapes(self.edited.graph())
        return bool(removable)

    def select(self, root: str, kept: Tensor) -> None:
        """Gives a bundle the channels `kept` of those it has, in that order, in every weight they touch."""
        ops = self.edited.ops
        for op in self.readers_of(root):
            weight = self.edited.weight(op, "weight")
            narrowed = self.by_channel(op)[:, kept].reshape(len(weight), -1, *weight.shape[2:])
            ops[op.output] = self.edited.with_weights(op, weight=narrowed)
        for name, op in list(ops.items()):
            axis = self.bundles.axes.get(name)
            if axis is None or self.bundles.root(name) != root:
                continue
            if op.tensors:
                rows = {role: value[kept] for role, value in self.edited.weights(op).items()}
                op = self.edited.with_weights(op, **rows)
            ops[name] = op.with_channels(len(kept), axis)

    def without(self, op: Op, dead: Tensor) -> Op:
        """A reader whose bias holds what its dead inputs give."""
        weight, spread = self.edited.weight(op, "weight"), self.by_channel(op)
        held = self.bundles.axes[op.inputs[0]].constant[dead].double().nan_to_num()
        moved = (spread[:, dead].double().sum(dim=2) @ held).to(weight.dtype)
        if not moved.any():
            return op
        bias = self.edited.weight(op, "bias") + moved if "bias" in op.tensors else moved
        return self.edited.with_weights(op, bias=bias)


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
