"""What a graph is lowered to: steps, and where what they read and write lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autoprune.repack.graph.ops import Conv2d, LayerOp, Op
from autoprune.repack.lowering.buffers import Arena, Buffer, MapAt, StridedRef
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.layout import FLOAT_BYTES, MapLayout, floats_of
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp

ARENA = 1  # slot of the arena; slot 0 holds 0


@dataclass(eq=False)
class PitchClass:
    """Maps of one pitch; `parent` is where a class went that was joined with another."""

    width: int = 0
    parent: PitchClass | None = None

    def root(self) -> PitchClass:
        return self if self.parent is None else self.parent.root()

    def join(self, other: PitchClass) -> None:
        mine, theirs = self.root(), other.root()
        if mine is not theirs:
            theirs.parent = mine
            mine.width = max(mine.width, theirs.width)


@dataclass(eq=False)
class Map:
    """A value as a feature map; its layout stands when every reader is known.

    Attributes:
        over: maps that this one may be written over, where they are not needed any more.
    """

    shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    border: float
    pitch: PitchClass = field(default_factory=PitchClass)
    pad: tuple[int, int] = (0, 0)
    reach: int = 0
    over: tuple[Map, ...] = ()
    buffer: Buffer = field(default_factory=lambda: Buffer(0))

    def padded(self, padding: tuple[int, int], reach: int = 0) -> Map:
        """Makes room for a reader that looks `padding` beyond the map, and `reach` columns more through masks."""
        self.reach = max(self.reach, reach)
        self.pad = (max(self.pad[0], padding[0]), max(self.pad[1], padding[1]))
        width, wide = self.shape[3], self.stride[1]
        needed = width + self.pad[1] if self.stride == (1, 1) else -(-(width + 2 * self.pad[1]) // wide)
        root = self.pitch.root()
        root.width = max(root.width, needed)
        return self

    @property
    def layout(self) -> MapLayout:
        _, channels, height, width = self.shape
        pitch = self.pitch.root().width
        return MapLayout(channels, height, width, pitch, *self.pad, *self.stride, self.border, self.reach)

    @property
    def at(self) -> MapAt:
        return MapAt(self.buffer, self.layout)

    def ref(self) -> StridedRef:
        """Where it lies, (N, C, H, W); once every layout stands."""
        return self.at.ref()


@dataclass(eq=False)
class NativeStep:
    """A native op.

    Attributes:
        build: from the layer's weights and tiling, where it has them.
        layer: the graph's operation where it has a packed weight.
        size: (positions or tokens, batch) of such a layer.
        by_position: whether it is a Linear that runs as a convolution, tokens side by side in a vector.
        op: the graph's operation; None: it brings the value `name` into another layout.
    """

    name: str
    reads: list[Buffer]
    writes: Buffer
    build: Callable[[Weights | None, Tiling], NativeOp]
    layer: LayerOp | None = None
    size: tuple[int, int] = (0, 0)
    op: Op | None = None
    by_position: bool = False

    @property
    def sources(self) -> list[Buffer]:
        """The buffers it reads, its scratch among them."""
        return self.reads

    @property
    def touched(self) -> list[Buffer]:
        """The buffers it reads or writes."""
        return [*self.reads, self.writes]

    @property
    def form(self) -> type[LayerOp]:
        """The class of layers that its kernel is made for."""
        assert self.layer is not None
        return Conv2d if self.by_position else type(self.layer)


@dataclass(eq=False)
class TorchStep:
    """An operation torch runs; its result goes to `slot`, at these strides."""

    op: Op
    reads: dict[str, View]
    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sources(self) -> list[Buffer]:
        """The buffers it reads."""
        return [view.buffer for view in self.reads.values()]

    @property
    def touched(self) -> list[Buffer]:
        """The buffers it reads or writes: its result has a slot of its own, and no buffer."""
        return self.sources


@dataclass(frozen=True)
class View:
    """A tensor somewhere in a slot: element offset from its buffer's begin, shape, strides, and its elements' type."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def start(self) -> int:
        """Elements from the slot's base."""
        return self.buffer.offset // self.dtype.itemsize + self.offset

    def ref(self) -> StridedRef:
        """Where it lies; once its buffer's place is known."""
        return StridedRef(self.buffer.slot, self.start * self.dtype.itemsize, self.stride, self.dtype)

    def rows(self) -> StridedRef:
        """A contiguous value as (rows, features), whatever axes it has before the last."""
        return replace(self.ref(), strides=(self.shape[-1], 1))


@dataclass(frozen=True)
class Lowered:
    """A program for one set of input shapes.

    Attributes:
        steps: in order.
        arena: memory plan of slot ARENA.
        slots: how many base addresses a call has.
        inputs: the slot of each input.
        limits: slot of an input of integers -> how many rows of a table they may tell.
        outputs: slot -> shape of the results native ops write into.
        constants: slot -> what lies there at every call: constants read as values, and what depends on shapes alone.
        threads: the most that may work on one call.
        scalars: the integers that torch's operators are given.
        returned: value -> where it lies when the last step is done.
        copied: those of them that lie in memory which is not theirs alone.
        wrong: bytes into the arena of an int64 that is not 0 after a call in which a number was no row's.
        values: every tensor that has a name, constants and those that lowering adds, on the meta device.
    """

    steps: tuple[NativeStep | TorchStep, ...]
    arena: Arena
    slots: int
    inputs: tuple[int, ...]
    limits: Mapping[int, int]
    outputs: Mapping[int, tuple[int, ...]]
    constants: Mapping[int, Tensor]
    scalars: Mapping[str, int]
    threads: int
    returned: Mapping[str, View]
    copied: frozenset[str]
    wrong: int | None
    values: Mapping[str, Tensor]

    def __str__(self) -> str:
        """The steps in order, with where they read and write: a slot, or bytes into the arena."""
        lines = [f"arena: {self.arena.size * FLOAT_BYTES} bytes; inputs in slots {list(self.inputs)}"]
        for number, step in enumerate(self.steps):
            if isinstance(step, NativeStep):
                kind = step.op.kind if step.op is not None else "another layout"
                read, written = ", ".join(map(str, step.reads)), str(step.writes)
                lines.append(f"{number:4d} {step.name} = {kind}({read}) -> {written}")
            else:
                read = ", ".join(f"{name} in {view.buffer}" for name, view in step.reads.items())
                lines.append(f"{number:4d} {step.op.output} = torch {step.op.label}({read}) -> slot {step.slot}")
        lines += [f"returns {name} in {view.buffer}" for name, view in self.returned.items()]
        return "\n".join(lines)

    def is_whole(self, name: str) -> bool:
        """Whether a result is all of a tensor that is made for it."""
        view = self.returned[name]
        alone = view.start == 0 and name not in self.copied and is_contiguous(view)
        return alone and self.outputs.get(view.buffer.slot) == view.shape


def storage_of(meta: Tensor) -> int:
    """What tells whether two tensors share memory."""
    return int(meta.untyped_storage()._cdata)


def settled(x: Tensor) -> Tensor:
    """The same values as bits in memory: torch negates and conjugates by a flag, which native code does not see."""
    return x.resolve_conj().resolve_neg() if x.is_neg() or x.is_conj() else x


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of rows that follow each other."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_contiguous(view: View) -> bool:
    return view.stride == contiguous_strides(view.shape)


def overwritten(shape: tuple[int, ...], sources: Sequence[Map | View], y: View) -> tuple[Buffer, ...]:
    """The buffers of sources that fill them as `y` fills its own, entry by entry."""

    def filled(view: View) -> tuple[object, ...]:
        return view.shape, view.stride, view.offset, view.dtype.itemsize, view.buffer.size

    wanted = shape, contiguous_strides(shape), 0, y.dtype.itemsize, floats_of(math.prod(shape), y.dtype.itemsize)
    alike = [each.buffer for each in sources if isinstance(each, View) and filled(each) == filled(y) == wanted]
    read = [each.buffer for each in sources]
    return tuple(buffer for buffer in alike if read.count(buffer) == alike.count(buffer))
