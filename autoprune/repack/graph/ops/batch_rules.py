"""Rules by which samples of a batch stay apart; each is a `BatchRule`."""

from __future__ import annotations

import math

from autoprune.repack.graph.ops.base import Axes, Op, Shapes


def first(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """All inputs have the batch first, and so has the output."""
    return axis == 0 and all(axes[name] == 0 for name in op.inputs)


def not_last(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """It works along the last axis, which is not the batch's."""
    alike = all(axes[name] == axis and len(shapes[name]) == len(shapes[op.output]) for name in op.inputs)
    return alike and axis < len(shapes[op.output]) - 1


def outer(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """A product of matrices: the batch is one of the axes before their rows; one operand may be the same for all."""
    return axis < len(shapes[op.output]) - 2 and aligned(op, axes, shapes, axis)


def attending(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """Attention: likewise, and queries, keys and values are all of the batch."""
    return outer(op, axes, shapes, axis) and all(axes[name] is not None for name in op.inputs[:3])


def aligned(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """An operation a position at a time, its operands repeated along the first axes where they are missing."""
    behind = len(shapes[op.output]) - axis
    places = [(name, axes[name]) for name in op.reads if name in axes]
    return all(at is None or len(shapes[name]) - at == behind for name, at in places)


def repeated(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """Repeated along some axes."""
    return aligned(op, axes, shapes, axis)


def refolded(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """A reshape: what lies before the batch's axis stays before it."""
    source = next(name for name in op.reads if axes.get(name) is not None)
    before = shapes[source][: axes[source]]
    return math.prod(before) == math.prod(shapes[op.output][:axis])


def moved(op: Op, axes: Axes, shapes: Shapes, axis: int) -> bool:
    """Axes change places, come or go."""
    return True
