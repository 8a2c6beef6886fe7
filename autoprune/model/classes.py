"""Which axis of a model's output holds the classes that a target names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

IMAGE = 4  # dimensions from which on the classes are channels, where shapes alone leave both axes possible


def class_axis(output: Tensor, target: Any) -> int | None:
    """The axis of the classes in logits of class indices; None where the target holds no class indices of them.

    Args:
        output: logits: (N, classes) of targets (N,); (N, T, classes) or (N, classes, T) of (N, T); (N, classes, H, W)
            of (N, H, W), and so on. Where both axes fit, the last one is taken, of images the second.
        target: integers.
    """
    whole = isinstance(target, Tensor) and not (target.is_floating_point() or target.is_complex())
    if not whole or str(target.dtype) == "torch.bool" or output.dim() != target.dim() + 1 or output.dim() < 2:
        return None
    last = output.shape[:-1] == target.shape
    second = output.shape[:1] + output.shape[2:] == target.shape
    if second and (not last or output.dim() >= IMAGE):
        return 1
    return output.dim() - 1 if last else None


def classes_last(output: Tensor, target: Any) -> Tensor:
    """The output with its classes along the last axis; as it is where it has none."""
    axis = class_axis(output, target)
    return output if axis is None else output.movedim(axis, -1)
