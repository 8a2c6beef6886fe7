"""A pass that lets a convolution make the border of zeros that it was given."""

from __future__ import annotations

from dataclasses import replace

from autoprune.repack.graph.editor import Editor
from autoprune.repack.graph.ops import Conv2d, Op, TorchOp

_PADS = ("aten.pad.default", "aten.constant_pad_nd.default")


def fold_border(edited: Editor, op: Op) -> bool:
    """As many rows and columns of zeros at one side as at the other become the convolution's own padding."""
    border = edited.ops.get(op.inputs[0]) if isinstance(op, Conv2d) else None
    if not isinstance(op, Conv2d) or not isinstance(border, TorchOp) or border.op not in _PADS:
        return False
    args = border.named_args()
    pads = [*args["pad"], 0, 0, 0, 0][: max(4, len(args["pad"]))]
    zeros = args.get("mode", "constant") == "constant" and not args.get("value")
    if not zeros or len(pads) > 4 or any(type(each) is not int or each < 0 for each in pads):
        return False
    left, right, top, bottom = pads
    if (left, top) != (right, bottom):
        return False
    padding = (op.padding[0] + top, op.padding[1] + left)
    edited.replace(op, replace(op, inputs=(border.inputs[0], *op.inputs[1:]), padding=padding))
    return True
