"""Rules of torch's operators on feature maps: group norm, resizing, padding, adaptive pooling of uneven windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from autoprune.repack.graph.ops import AdaptiveAvgPool2d, Op, TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.lowering import map_nodes
from autoprune.repack.lowering.layout import ALIGN, aligned
from autoprune.repack.lowering.steps import NativeStep, is_float
from autoprune.repack.native.op import NativeOp

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

MOST_TAPS = 64  # rows or columns that become one
LONGEST = 4096  # rows or columns of which a matrix is made to tell what becomes of each
_aten = torch.ops.aten
_Along = Callable[[Tensor, int], Tensor]


def group_norm(lowering: Lowering, op: TorchOp) -> bool:
    """On a map, with constant weights."""
    args = op.named_args()
    name = args["input"]["ref"]
    x = lowering.values[name]
    arrays = [_array(lowering, args.get(role), x, default) for role, default in (("weight", 1.0), ("bias", 0.0))]
    if x.dim() != 4 or not is_float(x) or not x.numel() or any(each is None for each in arrays):
        return False
    evaluate_op(op, lowering.values, lowering.constants)  # raises unless the channels come in so many groups
    groups, epsilon = args["num_groups"], float(args.get("eps", 1e-5))
    if type(groups) is not int:  # computed
        return False
    given, made = lowering.map(name), lowering.new_map(op, tuple(x.shape))
    made.pitch.join(given.pitch)
    weight, bias = (each for each in arrays if each is not None)

    def build(*_: Any) -> NativeOp:
        return map_nodes.group_norm(
            op.output, x.shape[0], given.at, made.at, groups, weight, bias, epsilon, lowering.target
        )

    lowering.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build))
    return True


def _array(lowering: Lowering, given: Any, x: Tensor, default: float) -> NDArray[np.float32] | None:
    """A weight of each channel; None where it is computed, or does not fit."""
    channels = x.shape[1] if x.dim() > 1 else 0
    if given is None:
        return np.full(channels, default, np.float32)
    value = lowering.graph.constants.get(given["ref"])
    if value is None or value.is_meta or not is_float(value) or tuple(value.shape) != (channels,):
        return None
    return value.contiguous().numpy()


def resized(lowering: Lowering, op: TorchOp) -> bool:
    """Nearest or bilinear: along either axis by itself, as torch does it in one."""
    args = op.named_args()
    name = args["input"]["ref"]
    scales = args.get("scale_factors") or (None, None)

    def along(axis: int) -> _Along:
        def resize(basis: Tensor, size: int) -> Tensor:
            scale = scales[axis - 2]
            if "nearest" in op.op:
                made: Tensor = _aten.upsample_nearest1d.default(basis, [size], scale)
            else:
                made = _aten.upsample_linear1d.default(basis, [size], args["align_corners"], scale)
            return made

        return resize

    return _resampled(lowering, op, name, (along(2), along(3)))


def padded(lowering: Lowering, op: TorchOp) -> bool:
    """A border around a map: of zeros, or of what lies inside."""
    args = op.named_args()
    pads, mode = args["pad"], args.get("mode", "constant")
    if (mode == "constant" and args.get("value")) or len(pads) > 4 or len(pads) % 2 or any(
        type(each) is not int for each in pads
    ):  # fmt: skip
        return False
    if mode == "constant":
        return _zero_padded(lowering, op, args["self"]["ref"], pads)
    by_axis = {3: pads[:2], 2: pads[2:]}

    def along(axis: int) -> _Along:
        return lambda basis, _: F.pad(basis, by_axis[axis], mode) if any(by_axis[axis]) else basis

    return _resampled(lowering, op, args["self"]["ref"], (along(2), along(3)))


def _zero_padded(lowering: Lowering, op: TorchOp, name: str, pads: list[int]) -> bool:
    """A map is copied between rows and columns of zeros, or without some of its own."""
    x = lowering.values[name]
    if x.dim() != 4 or not is_float(x):
        return False
    shape = tuple(evaluate_op(op, lowering.values, lowering.constants).shape)
    if min(*x.shape, *shape) < 1:
        return False
    given, made = lowering.map(name), lowering.new_map(op, shape)
    if name in lowering.positive:
        lowering.positive.add(op.output)
    corner = (*pads[2:3], 0)[0], pads[0]

    def build(*_: Any) -> NativeOp:
        return map_nodes.padded(op.output, x.shape[0], given.at, made.at, corner, lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build))
    return True


def adaptive(lowering: Lowering, op: AdaptiveAvgPool2d) -> bool:
    """Means over windows that differ."""
    pool: _Along = F.adaptive_avg_pool1d
    return _resampled(lowering, op, op.inputs[0], (pool, pool))


def adaptive_max(lowering: Lowering, op: TorchOp) -> bool:
    """The largest of each of as many windows as the output has positions; where they lie is left to torch."""
    pool: _Along = F.adaptive_avg_pool1d  # of the same windows
    return op.item == 0 and _resampled(lowering, op, op.inputs[0], (pool, pool), largest=True)


def _resampled(lowering: Lowering, op: Op, name: str, along: tuple[_Along, _Along], largest: bool = False) -> bool:
    """An operation that is alike in every channel, and along either axis by itself: a sum, or the largest.

    Args:
        lowering: what is known so far.
        op: the operation.
        name: of the map.
        along: rows or columns ``(1, of anything, extent)`` and the extent wanted -> as the operation makes them; of
            the largest, anything but 0 for what is looked at.
        largest: whether it is the largest of what a sum would hold.
    """
    x = lowering.values[name]
    if x.dim() != 4 or not is_float(x):
        return False
    shape = tuple(evaluate_op(op, lowering.values, lowering.constants).shape)
    if min(*x.shape, *shape) < 1 or max(*x.shape[2:], *shape[2:]) > LONGEST:
        return False
    taps = [_taps(run(torch.eye(x.shape[axis])[None], shape[axis])[0]) for axis, run in zip((2, 3), along, strict=True)]
    if max(each.inputs.shape[1] for each in taps) > MOST_TAPS:
        return False
    given, made = lowering.map(name), lowering.new_map(op, shape)
    if name in lowering.positive:
        lowering.positive.add(op.output)
    room = aligned(x.shape[3]) + ALIGN
    scratch = lowering.scratch(room)

    def build(*_: Any) -> NativeOp:
        return map_nodes.resampled(
            op.output, x.shape[0], given.at, made.at, taps[0], taps[1], scratch, room, lowering.target, largest
        )

    lowering.steps.append(NativeStep(op.output, [given.buffer, scratch], made.buffer, build))
    return True


def _taps(matrix: Tensor) -> map_nodes.Taps:
    """What each column of ``(inputs, outputs)`` comes from; where that is less than for others, its first in shares.

    (Of weight 0 it would make infinity a NaN.)
    """
    weights = matrix.t().numpy()
    most = max(1, int((weights != 0).sum(1).max()))
    index = np.argsort(weights == 0, axis=1, kind="stable")[:, :most]
    weight = np.take_along_axis(weights, index, 1)
    spare = weight == 0
    index = np.where(spare, index[:, :1], index)
    share = weight[:, :1] / (1 + spare.sum(1, keepdims=True))
    weight = np.where(spare, share, weight)
    weight[:, :1] = share
    return map_nodes.Taps(np.ascontiguousarray(index, np.int32), np.ascontiguousarray(weight, np.float32))
