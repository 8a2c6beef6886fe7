"""Lowering: graph + packed weights + input shapes -> native ops, torch calls between them, and a memory plan.

Every value is tracked as torch would hold it, on the meta device: shape, strides, and which storage it is a view of.
So an operator that only views its input costs nothing, and a kernel that takes strides reads through the view. A value
a convolution works on lies in a feature map with a border instead (`layout`); it is copied from one form into the
other only where both are needed. Maps that one kernel reads and writes at the same flat positions need one pitch:
they form a class, whose pitch is what its widest member needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import Grid
from autoprune.repack.graph import aten
from autoprune.repack.graph.ir import FOLD_LIMIT, Graph
from autoprune.repack.graph.ops import Op, TorchOp
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.strided import AXES
from autoprune.repack.lowering import map_nodes, strided_nodes, token_nodes
from autoprune.repack.lowering.buffers import Buffer, StridedRef
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.layout import floats_of
from autoprune.repack.lowering.steps import (
    ARENA,
    Map,
    NativeStep,
    TorchStep,
    View,
    contiguous_strides,
    overwritten,
    settled,
    storage_of,
)
from autoprune.repack.lowering.strided_nodes import ENTRIES, Function
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp

NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")


class Lowering:
    """What is known of every value while a graph is lowered: where it lies, in which forms; and the steps so far.

    Rules take it as their first argument, ask it for their inputs in the layout that their kernel reads (`plain`,
    `rows`, `map`), define their output (`define`, `new_map`) and append a step.

    Attributes:
        values: meta tensors, and plain integers.
        maps: (value, stride of its phase planes, border value) -> its feature map.
        planes: rows of tokens with a channel a feature.
        grids: of the values that lie on one.
        made_of_bytes: value on a grid -> what appends the step that makes its floats.
        interleaved: (value on a grid, stride of its phase planes, byte around it, whether as tokens) -> its bytes.
        byte_rows: value on a grid -> its bytes where it has too few tokens for an interleaved map.
        unrounded: value on a grid -> the value that is rounded to it.
        readers: value -> the operations that read it.
        returned: the values that the model returns.
        tilings: of packed layers, where they stand; None while they are looked for.
        buffers: storage of a meta tensor -> where it lies.
        positive: values that are nowhere negative.
        steps: in the order they run.
        names: of all that the graph holds.
    """

    def __init__(
        self, graph: Graph, weights: Mapping[str, Weights], target: Target, threads: int,
        tilings: Mapping[str, Tiling] | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.weights, self.target, self.threads, self.tilings = graph, weights, target, threads, tilings
        self.steps: list[NativeStep | TorchStep] = []
        self.values: dict[str, Any] = {}  # meta tensors, and plain integers
        self.maps: dict[tuple[str, tuple[int, int], float], Map] = {}
        self.planes: dict[str, Map] = {}  # rows of tokens with a channel a feature
        self.grids: dict[str, Grid] = {}
        self.made_of_bytes: dict[str, Callable[[Lowering, str], None]] = {}
        self.interleaved: dict[tuple[str, tuple[int, int], int, bool], Map] = {}
        self.byte_rows: dict[str, Buffer] = {}
        self.unrounded: dict[str, str] = {}
        self.readers, self.returned = graph.consumers(), set(graph.output_names())
        self.buffers: dict[int, Buffer] = {}  # storage of a meta tensor -> where it lies
        self.copies: dict[str, tuple[Tensor, View]] = {}  # in rows; holds the tensor, so that its storage is no other's
        self.positive: set[str] = set()
        self.slots = ARENA + 1
        self.fixed: dict[int, Tensor] = {}
        self.known: dict[str, Tensor] = {}  # what depends on constants and shapes alone
        self.scratches: list[Buffer] = []
        self.wrong: Buffer | None = None  # an int64 that tells of a number which is no entry's
        self.input_slots: dict[str, int] = {}
        self.limits: dict[int, int] = {}
        self.constants = {name: tensor.to("meta") for name, tensor in graph.constants.items()}
        self.names = {*graph.constants, *(each.name for each in graph.inputs), *(op.output for op in graph.ops)}

    # Values ---------------------------------------------------------------------------------------------------------

    def in_slot(self) -> Buffer:
        """A buffer that is a slot of its own."""
        self.slots += 1
        return Buffer(0, slot=self.slots - 1)

    def own_name(self, name: str) -> str:
        """A name for a value that the graph does not hold: `name`, or longer where one of the graph's is called so."""
        while name in self.names:
            name += "'"
        return name

    def made(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> View:
        """A new value in rows, in a buffer of its own that a step is yet to write."""
        meta = self.values[name] = torch.empty(shape, device="meta", dtype=dtype)
        buffer = self.buffers[storage_of(meta)] = Buffer(floats_of(meta.numel(), dtype.itemsize))
        return View(buffer, 0, shape, contiguous_strides(shape), dtype)

    def define(self, name: str, shape: tuple[int, ...], order: tuple[int, ...] | None = None) -> Tensor:
        """A new float value: contiguous, or contiguous after permuting its axes into `order`."""
        if order is None:
            meta = torch.empty(shape, device="meta", dtype=torch.float32)
        else:
            meta = torch.empty([shape[axis] for axis in order], device="meta", dtype=torch.float32)
            meta = meta.permute([order.index(axis) for axis in range(len(order))])
        self.values[name] = meta
        return meta

    def plain(self, name: str) -> View:
        """The value as torch holds it; a map is copied into rows first."""
        meta = self.values[name]
        key = storage_of(meta)
        if key not in self.buffers and name in self.constants:
            self.buffers[key] = self.in_slot()
            self.fixed[self.slots - 1] = self.graph.constants[name]
        if key not in self.buffers and name in self.planes:
            turn_back(self, name, self.planes[name])
        if key not in self.buffers and name in self.made_of_bytes:
            self.made_of_bytes[name](self, name)
        if key not in self.buffers:
            source = self.maps[name, (1, 1), 0.0]
            buffer = self.buffers[key] = Buffer(meta.numel())

            def build(*_: Any) -> NativeOp:
                y = buffer.ref(*contiguous_strides(source.shape))
                return map_nodes.copied(name, source.shape, source.ref(), y, None, self.target)

            self.steps.append(NativeStep(name, [source.buffer], buffer, build))
        shape, stride = tuple(meta.shape), tuple(meta.stride())
        return View(self.buffers[key], meta.storage_offset(), shape, stride, meta.dtype)

    def rows(self, name: str) -> View:
        """The value as contiguous rows; copied where it is not."""
        if self.values[name].is_contiguous():
            return self.plain(name)
        if name not in self.copies:
            meta = self.values[name].contiguous()
            view = copied(self, name, meta)
            op = TorchOp.of(self.own_name(f"{name} contiguous"), "aten.contiguous.default", ({"ref": name},))
            self.copies[name] = (meta, view or self.torch_step(op, meta))
        return self.copies[name][1]

    def map(
        self, name: str, padding: tuple[int, int] = (0, 0), stride: tuple[int, int] = (1, 1), border: float = 0.0,
        reach: int = 0,
    ) -> Map:  # fmt: skip
        """The value as a map with room for `padding` and `reach`, in phase planes where `stride` is given."""
        key = (name, stride, border)
        if key not in self.maps:
            self.convert(name, key)
        return self.maps[key].padded(padding, reach)

    def convert(self, name: str, key: tuple[str, tuple[int, int], float]) -> None:
        batch, channels, height, width = self.values[name].shape
        made = self.maps[key] = Map((batch, channels, height, width), key[1], key[2])
        self.copy_into(name, made, again=key[1:] != ((1, 1), 0.0))

    def copy_into(self, name: str, made: Map, first: int = 0, again: bool = True, rounds: bool = False) -> None:
        """Copies the value, or what it `rounds` to in bf16, into channels from `first` on; from its map if `again`."""
        source: Map | View | None = self.maps.get((name, (1, 1), 0.0)) if again else None
        if source is None:
            source = self.plain(name)
            source = source if source.stride[3] == 1 else self.rows(name)
        read, (batch, channels, height, width) = source, self.values[name].shape
        shape = (batch, channels, height, width)

        def build(*_: Any) -> NativeOp:
            return map_nodes.copied(name, shape, read.ref(), made.at.ref(first), made.layout, self.target, rounds)

        self.steps.append(NativeStep(name, [source.buffer], made.buffer, build))

    def new_map(self, op: Op, shape: tuple[int, ...]) -> Map:
        """The map a native op writes."""
        self.define(op.output, shape)
        batch, channels, height, width = shape
        made = self.maps[op.output, (1, 1), 0.0] = Map((batch, channels, height, width), (1, 1), 0.0)
        if op.last_activation in NOT_NEGATIVE:
            self.positive.add(op.output)
        return made.padded((0, 0))

    # Operations -----------------------------------------------------------------------------------------------------

    def torch_step(self, op: Op, meta: Any) -> View:
        if not isinstance(meta, Tensor):
            raise AutopruneError(f"{op.kind} {op.label} returns several tensors")
        reads = {}
        for name in op.reads:
            if isinstance(self.values[name], Tensor) and name not in self.constants:
                reads[name] = self.plain(name)
        buffer = self.buffers[storage_of(meta)] = self.in_slot()
        if isinstance(op, TorchOp) and self.is_known(op, meta):
            result = self.known[op.output] = self.computed(op)  # it depends on constants and shapes alone
            self.fixed[buffer.slot] = result
            return View(buffer, 0, tuple(meta.shape), tuple(meta.stride()), meta.dtype)
        self.steps.append(TorchStep(op, reads, buffer.slot, tuple(meta.shape), tuple(meta.stride()), meta.dtype))
        return View(buffer, 0, tuple(meta.shape), tuple(meta.stride()), meta.dtype)

    def fixed_value(self, name: str) -> Tensor | None:
        """A constant, or what depends on constants and shapes alone; None for any other value."""
        value = self.known.get(name, self.graph.constants.get(name))
        return None if value is None or value.is_meta else value

    def is_known(self, op: TorchOp, meta: Tensor) -> bool:
        """Whether a torch operation reads nothing that a call gives, and its result is not too large to be kept."""
        given = [self.fixed_value(name) for name in op.reads if isinstance(self.values[name], Tensor)]
        known = [value for value in given if value is not None]
        most = max(FOLD_LIMIT, *(value.numel() for value in known), 0)
        return len(known) == len(given) and (meta.numel() <= most or not known)

    def computed(self, op: TorchOp) -> Tensor:
        """What such an operation gives."""
        values = {**self.graph.constants, **self.known}
        known = {name: values.get(name, self.values[name]) for name in op.reads}
        return settled(op.bound(known)({})).contiguous()

    def scratch(self, floats: int) -> Buffer:
        """Room for every thread to work in."""
        self.scratches.append(Buffer(self.threads * floats, scratch=True))
        return self.scratches[-1]

    def same_shape(self, op: Op, added: str | None, shape: tuple[int, ...]) -> None:
        """Raises AutopruneError unless the value `added` to the result of `op`, where there is one, has `shape`."""
        if added is not None and tuple(self.values[added].shape) != shape:
            raise AutopruneError(
                f"{op.output!r} adds a value of shape {tuple(self.values[added].shape)} to one of {shape}."
            )


def turned(lowering: Lowering, name: str, tokens: int) -> Map:
    """Rows of tokens as a map with a channel a feature."""
    if name not in lowering.planes:
        view = lowering.rows(name)
        made = lowering.planes[name] = Map((1, view.shape[-1], 1, tokens), (1, 1), 0.0).padded((0, 0))

        def build(*_: Any) -> NativeOp:
            return token_nodes.into_planes(name, tokens, view.rows(), made.at, lowering.target)

        lowering.steps.append(NativeStep(name, [view.buffer], made.buffer, build))
    return lowering.planes[name]


def turn_back(
    lowering: Lowering, name: str, given: Map, residual: View | None = None, activation: str | None = None
) -> None:
    """The value `name` in rows, from a map with a channel a feature."""
    meta = lowering.values[name]
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    _, features, _, tokens = given.shape

    def build(*_: Any) -> NativeOp:
        y, other = buffer.ref(features, 1), None if residual is None else residual.rows()
        return token_nodes.out_of_planes(name, tokens, given.at, y, other, activation, lowering.target)

    reads = [given.buffer, *([residual.buffer] if residual is not None else [])]
    lowering.steps.append(NativeStep(name, reads, buffer, build))


def copied(lowering: Lowering, name: str, meta: Tensor) -> View | None:
    """The value copied into rows, which `meta` stands for; None when torch has to copy it."""
    x = operand(lowering, name)
    if x is None or not meta.is_contiguous() or not fitting(x.shape, [x]):
        return None
    buffer = lowering.buffers[storage_of(meta)] = Buffer(floats_of(meta.numel(), meta.element_size()))
    write(lowering, name, x.shape, [x], View(buffer, 0, x.shape, contiguous_strides(x.shape), meta.dtype))
    return View(buffer, 0, tuple(meta.shape), tuple(meta.stride()), meta.dtype)


@dataclass(frozen=True)
class Operand:
    """A value to be read.

    Attributes:
        source: where it lies; an array of one float for a number.
    """

    source: Map | View | NDArray[np.float32]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of its entries."""
        return self.source.dtype if isinstance(self.source, View) else torch.float32

    @property
    def buffers(self) -> list[Buffer]:
        """What a step that reads it depends on."""
        return [] if isinstance(self.source, np.ndarray) else [self.source.buffer]

    def ref(self, shape: tuple[int, ...]) -> StridedRef:
        """Where it lies, repeated to `shape`."""
        if isinstance(self.source, np.ndarray):
            return StridedRef(0, self.source, (0,) * len(shape))
        whole = self.source.ref()
        own = [0 if size == 1 else step for size, step in zip(self.shape, whole.strides, strict=True)]
        return replace(whole, strides=(0,) * (len(shape) - len(own)) + tuple(own))


def value_of(encoded: Any) -> Any:
    """An argument as it stands in a graph: a value's name, or a number."""
    if isinstance(encoded, dict):
        return encoded["ref"] if "ref" in encoded else aten.decode(encoded, {})
    return encoded


def operand(lowering: Lowering, given: Any, dtype: torch.dtype = torch.float32) -> Operand | None:
    """A value by its name, or a number, which is one of `dtype`.

    None for a value of a type that no kernel knows, or a number that `dtype` does not hold: torch wraps or refuses it.
    """
    known = lowering.values.get(given) if isinstance(given, str) else given
    if isinstance(known, (int, float)):
        if dtype not in ENTRIES:
            return None
        if dtype == torch.float32:
            return Operand(np.full(1, known, np.float32), ())
        if dtype != torch.bool and not ENTRIES[dtype].least <= known <= ENTRIES[dtype].largest:
            return None
        buffer = lowering.in_slot()  # it lies ready for every call
        lowering.fixed[buffer.slot] = torch.tensor(known, dtype=dtype, device="cpu")
        return Operand(View(buffer, 0, (), (), dtype), ())
    if not isinstance(known, Tensor) or known.dtype not in ENTRIES:
        return None
    made = lowering.maps.get((given, (1, 1), 0.0)) if storage_of(known) not in lowering.buffers else None
    return Operand(lowering.plain(given) if made is None else made, tuple(known.shape))


def operands(lowering: Lowering, given: Sequence[Any], dtype: torch.dtype = torch.float32) -> list[Operand] | None:
    """Several; None where there is one that no kernel knows."""
    found = [operand(lowering, each, dtype) for each in given]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else None


def fitting(shape: tuple[int, ...], operands: Sequence[Operand], y: tuple[int, ...] | None = None) -> bool:
    """Whether the kernel has enough axes; `y` are the result's strides, None: it lies in rows."""
    if sum(size != 1 for size in shape) <= AXES:
        return True
    if any(isinstance(each.source, Map) for each in operands):  # its strides are not known yet
        return False
    strides = [*(each.ref(shape).strides for each in operands), contiguous_strides(shape) if y is None else y]
    return len(strided_nodes.coalesced(shape, strides)[0]) <= AXES


def write(
    lowering: Lowering, name: str, shape: tuple[int, ...], operands: Sequence[Operand], y: View,
    find: Function | None = None, choice: Operand | None = None,
) -> None:  # fmt: skip
    """The step that computes `shape` of `y`: a copy where there is nothing to find.

    With a `choice` of booleans it picks one of two operands.
    """
    what = find or Function("", None, y.dtype)
    read = [*operands, *([] if choice is None else [choice])]
    y.buffer.over = overwritten(shape, [each.source for each in read if not isinstance(each.source, np.ndarray)], y)

    def build(*_: Any) -> NativeOp:
        given, picked = [each.ref(shape) for each in operands], None if choice is None else choice.ref(shape)
        return strided_nodes.pointwise(name, shape, given, y.ref(), what, lowering.target, picked)

    lowering.steps.append(NativeStep(name, [buffer for each in read for buffer in each.buffers], y.buffer, build))


def picked(lowering: Lowering, name: str, choice: str, given: Sequence[Any], dtype: torch.dtype) -> bool:
    """Defines `name`, of `dtype`: the first of two values, or numbers, where `choice` is true, else the second.

    False where `choice` holds no booleans, or the kernel has too few axes, or does not know a type.
    """
    booleans, found = lowering.values[choice], operands(lowering, given, dtype)
    if booleans.dtype != torch.bool or found is None or dtype not in ENTRIES:
        return False
    chosen = Operand(lowering.plain(choice), tuple(booleans.shape))
    shape = tuple(torch.broadcast_shapes(chosen.shape, *(each.shape for each in found)))
    if not fitting(shape, [*found, chosen]):
        return False
    write(lowering, name, shape, found, lowering.made(name, shape, dtype), choice=chosen)
    return True
