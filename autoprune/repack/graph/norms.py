"""Passes that take batch norms away: into the layer before or behind them, else as what multiplies and adds."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from autoprune.repack.graph.editor import AnyOp, Editor
from autoprune.repack.graph.ops import Conv2d, LayerOp, Linear, Op, Reshape, TorchOp
from autoprune.repack.graph.volumes import FRAMES_FIRST
from autoprune.repack.weights.batch_norm import affine, folded

_NORM = "aten.batch_norm.default"


def fold_norm(edited: Editor, op: Op) -> bool:
    """A batch norm scales the filters of the layer before it; zeros stay zeros."""
    if not _is_norm(op):
        return False
    layer = edited.ops.get(op.inputs[0])
    if not isinstance(layer, (Conv2d, Linear)) or not edited.only_reader(layer, op) or layer.is_fused:
        return False
    if isinstance(layer, Linear) and len(edited.shapes[layer.output]) != 2:
        return False  # it normalises the second axis, which is not the Linear's
    edited.merge(layer, op, _scaled(edited, layer, replace(layer, output=op.output), op))
    return True


def fold_norm_of_tokens(edited: Editor, op: Op) -> bool:
    """Likewise, where the tokens of a Linear come in one row each before the norm."""
    if not _is_norm(op) or len(edited.shapes[op.output]) != 2:
        return False
    rows = edited.ops.get(op.inputs[0])
    layer = edited.ops.get(rows.inputs[0]) if isinstance(rows, Reshape) else None
    if not isinstance(rows, Reshape) or not isinstance(layer, Linear) or layer.is_fused:
        return False
    features = edited.shapes[layer.output][-1] == edited.shapes[op.output][-1]
    if not features or not edited.only_reader(rows, op) or not edited.only_reader(layer, rows):
        return False
    edited.ops[layer.output] = _scaled(edited, layer, layer, op)
    edited.replace(op, replace(rows, output=op.output))
    return True


def fold_norm_of_videos(edited: Editor, op: Op) -> bool:
    """Likewise, where the maps of a convolution are put together as videos before the norm."""
    if not _is_norm(op) or len(edited.shapes[op.output]) != 5:
        return False
    turned = edited.ops.get(op.inputs[0])
    if not isinstance(turned, TorchOp) or turned.op != "aten.permute.default" or turned.args[1] != list(FRAMES_FIRST):
        return False
    frames = edited.ops.get(turned.inputs[0])
    layer = edited.ops.get(frames.inputs[0]) if isinstance(frames, Reshape) else None
    if not isinstance(frames, Reshape) or not isinstance(layer, Conv2d) or layer.is_fused:
        return False
    alone = edited.only_reader(turned, op) and edited.only_reader(frames, turned) and edited.only_reader(layer, frames)
    if not alone or edited.shapes[layer.output][1:] != edited.shapes[frames.output][2:]:
        return False
    edited.ops[layer.output] = _scaled(edited, layer, layer, op)
    edited.replace(op, replace(turned, output=op.output))
    return True


def fold_norm_forward(edited: Editor, op: Op) -> bool:
    """A batch norm of rows scales the columns of the Linear behind it, where there is none before it."""
    norm = edited.ops.get(op.inputs[0]) if isinstance(op, Linear) else None
    if norm is None or not _is_norm(norm) or len(edited.shapes[norm.output]) != 2 or not edited.only_reader(norm, op):
        return False
    weight, (scale, shift) = edited.weight(op, "weight"), _affine(edited, norm)
    bias = edited.weights(op).get("bias", torch.zeros(len(weight))).double() + weight.double() @ shift
    made = replace(op, inputs=(norm.inputs[0], *op.inputs[1:]))
    scaled = (weight.double() * scale).to(weight.dtype)
    edited.replace(op, edited.with_weights(made, weight=scaled, bias=bias.to(weight.dtype)))
    return True


def standalone_norm(edited: Editor, op: Op) -> bool:
    """A batch norm with no layer to go into: a depthwise convolution with one tap, of rows a product and a sum."""
    if not _is_norm(op) or len(edited.shapes[op.output]) not in (2, 4):
        return False
    if edited.constants[op.args[3]["ref"]].dtype != torch.float32:
        return False
    scale, shift = (x.float() for x in _affine(edited, op))
    if len(edited.shapes[op.output]) == 2:
        factor, term = (edited.constant(f"{op.output}.{name}", x) for name, x in (("scale", scale), ("shift", shift)))
        product = TorchOp.of(
            edited.free_name(f"{op.output} scaled"), "aten.mul.Tensor", ({"ref": op.inputs[0]}, {"ref": factor})
        )
        total = TorchOp.of(op.output, "aten.add.Tensor", ({"ref": product.output}, {"ref": term}))
        edited.expand(op, [product, total])
        return True
    made = Conv2d(
        op.output, op.inputs[:1], stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=len(scale), activation=None
    )
    edited.replace(op, edited.with_weights(made, weight=scale[:, None, None, None], bias=shift))
    return True


def _is_norm(op: Op) -> TypeGuard[TorchOp]:
    return isinstance(op, TorchOp) and op.op == _NORM


def _scaled(edited: Editor, layer: LayerOp, made: AnyOp, norm: TorchOp) -> AnyOp:
    """`made` with the weights of `layer`, and `norm` in them."""
    held = edited.weights(layer)
    weight, bias = folded(held["weight"], held.get("bias"), *_affine(edited, norm))
    return edited.with_weights(made, weight=weight, bias=bias)


def _affine(edited: Editor, op: TorchOp) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by and adds, in float64."""
    args = op.args
    weight, bias, mean, var = (None if x is None else edited.constants[x["ref"]] for x in args[1:5])
    assert mean is not None
    assert var is not None
    return affine(mean, var, weight, bias, args[7])
