"""What a graph asks for on its example inputs, told from shapes alone before anything is built.

A file of some kilobytes can ask for gigabytes or hours: by shapes far beyond the weights it holds, borders and strides
that feature maps are laid out for, windows, sizes of new tensors, products of products. It is refused where that is out
of all proportion to the file and its inputs. The proportions are far above any model's: images of four megapixels, all
of which meet every weight of a file that is 90% zeros and stored in 8 bits, are well within them.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph import aten
from autoprune.repack.graph.ir import Graph, Op
from autoprune.repack.graph.reference import evaluate_op

MEMORY, MEMORY_A_BYTE = 2**28, 2**8  # bytes in use at a time: in any case, and more for each byte of file and inputs
WORK, WORK_A_BYTE, WORK_AN_INPUT_BYTE = 2**32, 2**21, 2**12  # multiply-adds
WEIGHTS, WEIGHTS_A_BYTE = 2**24, 2**12  # that are declared, zeros and all
INPUTS = 2**26  # bytes of example inputs that count; a call's inputs are the caller's
PARTS = 2**12  # tensors that one operation may give
LARGEST = 2**63  # of an integer that is computed
ELEMENT = 32  # multiply-adds that an element of an operation's result costs in other ways
LINE = 64  # bytes; a plane of a strided feature map takes at least two
_PRODUCTS = ("mm", "mv", "matmul", "linear", "einsum", "outer", "attention", "cdist", "pdist")


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
        asked.work += _work(op, read, [constants[name] for name in op.tensors.values()], made, kept.get(op.output))
        living = {name: size for name, size in living.items() if last.get(name, 0) > at}
    return asked


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _check_parts(op: Op, values: Mapping[str, Any]) -> None:
    """Raises FileError where a tensor would be taken apart into too many, which even their shapes would take long."""
    name = op.attributes["op"] if op.kind == "torch" else ""
    if not name.startswith(("aten.unbind.", "aten.split.", "aten.chunk.", "aten.meshgrid.")):
        return
    args = aten.decode(op.attributes["args"], values)
    extent = max((n for x in args if isinstance(x, Tensor) for n in x.shape), default=0)
    sizes = [n for n in args[1:2] if type(n) is int and not name.startswith("aten.unbind.")] or [1]
    parts = sizes[0] if name.startswith("aten.chunk.") else extent // max(1, sizes[0])
    if min(extent, parts) > PARTS:
        raise FileError(f"the operation {op.output!r} takes a tensor apart into {min(extent, parts)}")


def _laid_out(op: Op, read: Sequence[Tensor]) -> int:
    """Bytes of the feature map that an operation reads, its border around it, in planes where it has strides."""
    a = op.attributes
    if "padding" not in a or not read or read[0].dim() != 4:
        return 0
    batch, channels, *extents = read[0].shape
    planes, plane = math.prod(a["stride"]), 4
    for extent, padding, stride in zip(extents, a["padding"], a["stride"], strict=True):
        plane *= -(-(extent + 2 * padding) // stride)
    return int(batch * channels * planes * (plane + 2 * LINE))


def _work(op: Op, read: Sequence[Tensor], weights: Sequence[Tensor], made: Tensor, kept: int | None) -> int:
    """Multiply-adds, about."""
    elements, name = made.numel(), op.kind
    work = ELEMENT * (elements + sum(each.numel() for each in read))
    if op.kind == "torch":
        name = op.attributes["op"].split(".")[1]
        weights = [each for each in read[1:2] if "conv" in name]
    if op.kind == "recurrent":
        return work + math.prod(made.shape[1:3]) * (weights[0].numel() if kept is None else kept)
    if weights and ("conv" in name or op.kind == "linear"):
        across = max(1, read[0].shape[1] if "transpose" in name else weights[0].shape[0])
        positions = (read[0].numel() if "transpose" in name else elements) // across
        return work + positions * (weights[0].numel() if kept is None else kept)
    if "pool" in name and "adaptive" not in name and "global" not in name:
        kernel = op.attributes["kernel"] if op.kind != "torch" else op.attributes["args"][1:2]
        return work + ELEMENT * elements * math.prod(n for n in _integers(kernel))
    if any(part in name for part in _PRODUCTS) and read:
        extents = {n for each in read for n in each.shape}
        return work + elements * max(extents - set(made.shape) or extents, default=1)
    return work


def _integers(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [n for each in value for n in _integers(each)]
    return [value] if type(value) is int else []
