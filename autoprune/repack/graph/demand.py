"""What a graph asks for on its example inputs, told from shapes alone before anything is built.

A file of some kilobytes can ask for gigabytes or hours: by shapes far beyond the weights it holds, borders and strides
that feature maps are laid out for, windows, sizes of new tensors, products of products. It is refused where that is out
of all proportion to the file and its inputs. The proportions are far above any model's: images of four megapixels, all
of which meet every weight of a file that is 90% zeros and stored in 8 bits, are well within them.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph import aten
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import (
    Activation,
    AdaptiveAvgPool2d,
    Add,
    Attention,
    AvgPool2d,
    Conv2d,
    ConvolutionOp,
    Experts,
    Gate,
    GatedConv2d,
    GlobalAvgPool,
    LayerNorm,
    LayerOp,
    Linear,
    MaxPool2d,
    Op,
    Quantize,
    Recurrent,
    Reshape,
    RmsNorm,
    Rotary,
    Scalar,
    Scale,
    TorchOp,
    WindowPoolOp,
)
from autoprune.repack.graph.reference import evaluate_op

MEMORY, MEMORY_A_BYTE = 2**28, 2**8  # bytes in use at a time: in any case, and more for each byte of file and inputs
WORK, WORK_A_BYTE, WORK_AN_INPUT_BYTE = 2**32, 2**21, 2**12  # multiply-adds
WEIGHTS, WEIGHTS_A_BYTE = 2**24, 2**12  # that are declared, zeros and all
INPUTS = 2**26  # bytes of example inputs that count; a call's inputs are the caller's
PARTS = 2**12  # tensors that one operation may give
LARGEST = 2**63  # of an integer that is computed
ELEMENT = 32  # multiply-adds that an element of an operation's result costs in other ways
LINE = 64  # bytes; a plane of a strided feature map takes at least two
_PRODUCTS = ("mm", "mv", "matmul", "linear", "einsum", "outer", "attention", "cdist", "pdist")  # in operators' names


# Into any number of parts, most of them empty.
_SECTIONS = ("aten.tensor_split.", "aten.hsplit.", "aten.vsplit.", "aten.dsplit.")


@dataclass
class _Demand:
    memory: int = 0
    work: int = 0
    weights: int = 0


def check_demand(graph: Graph, kept: Mapping[str, int], held: int) -> None:
    """Raises FileError when a validated graph asks for much more than its file accounts for.

    Args:
        graph: whose packed weights have shapes alone.
        kept: values of each packed layer, by the name of its output.
        held: bytes of the file.
    """
    inputs = {
        each.name: torch.empty(each.shape, dtype=aten.decode_dtype(each.dtype), device="meta") for each in graph.inputs
    }
    given = min(INPUTS, sum(map(_bytes, inputs.values())))
    asked = _demand(graph, inputs, kept)
    for what, much, allowed in (
        ("bytes of memory", asked.memory, MEMORY + MEMORY_A_BYTE * (held + given)),
        ("multiply-adds", asked.work, WORK + WORK_A_BYTE * held + WORK_AN_INPUT_BYTE * given),
        ("weights", asked.weights, WEIGHTS + WEIGHTS_A_BYTE * held),
    ):
        if much > allowed:
            raise FileError(
                f"it asks for {much:.3g} {what}, while a file of {held} bytes with inputs of {given} may ask for "
                f"{allowed:.3g}"
            )


def _demand(graph: Graph, inputs: Mapping[str, Tensor], kept: Mapping[str, int]) -> _Demand:
    """What all operations take: memory at its peak, as if every value were freed after its last use."""
    constants = {name: tensor.to("meta") for name, tensor in graph.constants.items()}
    layers = {op.tensors["weight"] for op in graph.ops if op.output in kept}
    asked = _Demand(weights=sum(constants[name].numel() for name in layers))
    values: dict[str, Any] = {
        "": torch.empty(0, device="meta"),
        **inputs,
    }  # a graph without inputs is one of shapes too
    known = ChainMap(values, constants)  # an operation reads either
    last = {name: at for at, op in enumerate(graph.ops) for name in op.reads}
    last |= dict.fromkeys(graph.output_names(), len(graph.ops))
    living = dict.fromkeys(inputs, 0)  # the caller's
    for at, op in enumerate(graph.ops):
        _check_parts(op, known)
        made = values[op.output] = evaluate_op(op, values, constants)
        if not isinstance(made, Tensor):
            if isinstance(made, int) and abs(made) >= LARGEST:
                raise FileError(f"the operation {op.output!r} computes an integer of {made.bit_length()} bits")
            continue
        read = [known[name] for name in op.inputs if isinstance(known[name], Tensor)]
        living[op.output] = _bytes(made)
        asked.memory = max(asked.memory, sum(living.values()) + _laid_out(op, read))
        weights = [constants[name] for name in op.tensors.values()]
        asked.work += _work(op, _Shapes(read, weights, made, kept.get(op.output)))
        living = {name: size for name, size in living.items() if last.get(name, 0) > at}
    return asked


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _check_parts(op: Op, values: Mapping[str, Any]) -> None:
    """Raises FileError where a tensor would be taken apart into too many, which even their shapes would take long."""
    parting = ("aten.unbind.", "aten.split.", "aten.chunk.", "aten.meshgrid.", *_SECTIONS)
    if not isinstance(op, TorchOp) or not op.op.startswith(parting):
        return
    name, named = op.op, {key: aten.decode(each, values) for key, each in op.named_args().items()}
    args, axis = list(named.values()), named.get("dim", 0)
    extent = max((n for x in args if isinstance(x, Tensor) for n in x.shape), default=0)
    if args and isinstance(args[0], Tensor) and type(axis) is int and -args[0].dim() <= axis < args[0].dim():
        extent = args[0].shape[axis]
    sizes = [n for n in args[1:2] if type(n) is int and not name.startswith("aten.unbind.")] or [1]
    parts = sizes[0] if name.startswith("aten.chunk.") else extent // max(1, sizes[0])
    parts = sizes[0] if name.startswith(_SECTIONS) else min(extent, parts)
    if parts > PARTS:
        raise FileError(f"the operation {op.output!r} takes a tensor apart into {parts}")


def _laid_out(op: Op, read: Sequence[Tensor]) -> int:
    """Bytes of the feature map that an operation reads, its border around it, in planes where it has strides."""
    if not isinstance(op, (ConvolutionOp, WindowPoolOp)) or not read or read[0].dim() != 4:
        return 0
    batch, channels, *extents = read[0].shape
    planes, plane = math.prod(op.stride), 4
    for extent, padding, stride in zip(extents, op.padding, op.stride, strict=True):
        plane *= -(-(extent + 2 * padding) // stride)
    return int(batch * channels * planes * (plane + 2 * LINE))


@dataclass(frozen=True)
class _Shapes:
    """What an operation reads and makes, on the meta device; `kept` values of its weight are stored, None for all."""

    read: Sequence[Tensor]
    weights: Sequence[Tensor]
    made: Tensor
    kept: int | None


def _work(op: Op, shapes: _Shapes) -> int:
    """Multiply-adds, about."""
    work = ELEMENT * (shapes.made.numel() + sum(each.numel() for each in shapes.read))
    rule = PRODUCTS[type(op)]
    return work if rule is None else work + rule(op, shapes)


def _layer_work(op: LayerOp, shapes: _Shapes) -> int:
    return op.positions(shapes.made.shape) * (shapes.weights[0].numel() if shapes.kept is None else shapes.kept)


def _expert_work(op: Experts, shapes: _Shapes) -> int:
    return shapes.made.numel() * shapes.weights[0].shape[1]


def _pool_work(op: WindowPoolOp, shapes: _Shapes) -> int:
    return ELEMENT * shapes.made.numel() * math.prod(op.kernel)


def _product_work(op: Op, shapes: _Shapes) -> int:
    """Products over the extents that the result does not have."""
    extents = {n for each in shapes.read for n in each.shape}
    return shapes.made.numel() * max(extents - set(shapes.made.shape) or extents, default=1)


def _torch_work(op: TorchOp, shapes: _Shapes) -> int:
    """Told from the operator's name."""
    read, elements, name = shapes.read, shapes.made.numel(), op.op.split(".")[1]
    if "conv" in name and len(read) > 1:
        across = max(1, read[0].shape[1] if "transpose" in name else read[1].shape[0])
        return (read[0].numel() if "transpose" in name else elements) // across * read[1].numel()
    if "pool" in name and "adaptive" not in name:
        return ELEMENT * elements * math.prod(_integers(op.args[1:2]))
    return _product_work(op, shapes) if read and any(part in name for part in _PRODUCTS) else 0


PRODUCTS: Mapping[type[Op], Callable[[Any, _Shapes], int] | None] = {
    Conv2d: _layer_work,
    GatedConv2d: _layer_work,
    Linear: _layer_work,
    Recurrent: _layer_work,
    Experts: _expert_work,
    MaxPool2d: _pool_work,
    AvgPool2d: _pool_work,
    Attention: _product_work,
    TorchOp: _torch_work,
    **dict.fromkeys(
        (
            Gate, Scale, AdaptiveAvgPool2d, GlobalAvgPool, Activation, Add, LayerNorm, RmsNorm, Rotary, Reshape, Scalar,
            Quantize,
        )
    ),
}  # fmt: skip
"""What each class of operations multiplies and adds beside `ELEMENT` for each element; None: no more than that."""


def _integers(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [n for each in value for n in _integers(each)]
    return [value] if type(value) is int else []
