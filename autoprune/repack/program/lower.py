"""Lowering: graph + packed weights + input shapes -> native ops, torch calls between them, and a memory plan.

Every value is tracked as torch would hold it, on the meta device: shape, strides, and which storage it is a view of.
So an operator that only views its input costs nothing, and a kernel that takes strides reads through the view. A value
a convolution works on lies in a feature map with a border instead (`layout`); it is copied from one form into the
other only where both are needed. Maps that one kernel reads and writes at the same flat positions need one pitch:
they form a class, whose pitch is what its widest member needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.repack.formats import GROUP_SIZES
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.gate import scratch as gate_scratch
from autoprune.repack.kernels.gated_gemm import Dead
from autoprune.repack.kernels.gated_gemm import scratch as gated_scratch
from autoprune.repack.kernels.window import Mode
from autoprune.repack.program import aten, convolutions, nodes, pointwise, tokens
from autoprune.repack.program.graph import FOLD_LIMIT, Graph, Op, evaluate_op
from autoprune.repack.program.kinds import KEEPS_ZERO, residual_of
from autoprune.repack.program.layout import ALIGN, FLOAT_BYTES, aligned
from autoprune.repack.program.memory import Buffer, place
from autoprune.repack.program.native import NativeOp
from autoprune.repack.program.steps import (
    ARENA,
    Lowered,
    Map,
    NativeStep,
    TorchStep,
    View,
    contiguous_strides,
    is_float,
    place_of,
    settled,
    storage_of,
)
from autoprune.repack.program.weights import Weights

WIDEST_STRIDE = 4  # of a sliding window's kernel
WIDEST_POOL = 32  # columns from a pooling's first to its last: code for them grows with their square
WIDEST_REACH = 4 * ALIGN  # columns beyond a row's ends: what lies there must be memory of the map's own buffer
CROWDED = 0.95  # share of a convolution's vectors that must be left for a map to have no border columns
# What torch and unpacking raise for values that do not fit an operation; a graph from a file may hold any.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")


def lower(
    graph: Graph, weights: Mapping[str, Weights], shapes: tuple[tuple[int, ...], ...], target: Target, threads: int
) -> Lowered:
    """Lowers `graph` for inputs of `shapes`.

    Args:
        graph: simplified.
        shapes: of its inputs.
        target: what the kernels are compiled for.
        threads: the most that will work on one call.
        weights: of every convolution and Linear that is packed, by the name of its output.

    Raises:
        AutopruneError: a shape the model does not take.
    """
    return Lowering(graph, weights, target, threads).run(shapes)


def is_depthwise(op: Op, weight: Tensor) -> bool:
    """Whether each channel is convolved alone, in a way that has a kernel of its own."""
    groups = op.attributes.get("groups", 1)
    narrow = op.attributes.get("stride", [1, 1])[1] <= WIDEST_STRIDE
    return groups > 1 and tuple(weight.shape[:2]) == (groups, 1) and len(op.inputs) == 1 and narrow


class Lowering:
    def __init__(self, graph: Graph, weights: Mapping[str, Weights], target: Target, threads: int) -> None:
        self.graph, self.weights, self.target, self.threads = graph, weights, target, threads
        self.steps: list[NativeStep | TorchStep] = []
        self.values: dict[str, Any] = {}  # meta tensors, and plain integers
        self.maps: dict[tuple[str, tuple[int, int], float], Map] = {}
        self.planes: dict[str, Map] = {}  # rows of tokens with a channel a feature
        self.buffers: dict[int, Buffer] = {}  # storage of a meta tensor -> where it lies
        self.copies: dict[str, tuple[Tensor, View]] = {}  # in rows; holds the tensor, so that its storage is no other's
        self.positive: set[str] = set()
        self.slots = ARENA + 1
        self.fixed: dict[int, Tensor] = {}
        self.known: dict[str, Tensor] = {}  # what depends on constants and shapes alone
        self.scratches: list[Buffer] = []
        self.wrong: Buffer | None = None  # an int64 that tells of a number which is no row's
        self.input_slots: dict[str, int] = {}
        self.limits: dict[int, int] = {}
        self.constants = {name: tensor.to("meta") for name, tensor in graph.constants.items()}

    def run(self, shapes: tuple[tuple[int, ...], ...]) -> Lowered:
        for given, shape in zip(self.graph.inputs, shapes, strict=True):
            meta = torch.empty(shape, dtype=getattr(torch, given.dtype), device="meta")
            self.values[given.name] = meta
            self.buffers[storage_of(meta)] = self.in_slot()
            self.input_slots[given.name] = self.slots - 1
        for name, tensor in self.constants.items():
            self.values[name] = tensor
        for op in self.graph.ops:
            try:
                self.lower_op(op)
            except FAILURES as error:
                told = f"the operation {op.output!r} ({op.kind}) does not take what it is given"
                raise AutopruneError(f"{told}: {error}") from error
        outputs: dict[int, tuple[int, ...]] = {}
        tensors = [name for name in self.graph.output_names() if isinstance(self.values[name], Tensor)]
        returned = {name: self.returned(name, outputs) for name in tensors}
        if self.wrong is not None:  # nothing else may ever lie there
            self.wrong.used(0)
            self.wrong.used(len(self.steps))
        for index, step in enumerate(self.steps):
            reads = step.reads if isinstance(step, NativeStep) else [view.buffer for view in step.reads.values()]
            for buffer in [*reads, *([step.writes] if isinstance(step, NativeStep) else [])]:
                buffer.used(index)
        for view in returned.values():
            view.buffer.used(len(self.steps))
        scalars = {name: value for name, value in self.values.items() if isinstance(value, int)}
        arena = place(self.native_buffers(), ARENA)
        copied = _sharing(returned, self.fixed)  # now that it is known what lies in the arena
        return Lowered(
            steps=tuple(self.steps),
            arena=arena,
            slots=self.slots,
            inputs=tuple(self.input_slots.values()),
            limits=self.limits,
            outputs=outputs,
            constants=self.fixed,
            scalars=scalars,
            threads=self.threads,
            returned=returned,
            copied=copied,
            wrong=None if self.wrong is None else self.wrong.offset,
            values={name: value for name, value in self.values.items() if isinstance(value, Tensor)},
        )

    def native_buffers(self) -> list[Buffer]:
        """Buffers that lie in the arena, sized now that every layout stands."""
        maps = [*self.maps.values(), *self.planes.values()]
        for each in maps:
            if each.over is not None:
                each.padded(each.over.pad, each.over.reach)  # one layout, so that one place can hold both
                each.buffer.over = each.over.buffer
        for each in maps:
            if each.buffer.slot < 0:
                each.buffer.layout = each.layout
                each.buffer.size = each.layout.size(each.shape[0])
                if each.layout.image > 2**31 - 1:
                    raise AutopruneError(f"a feature map of shape {each.shape} is too large for 32-bit offsets.")
        known = [*(each.buffer for each in maps), *self.buffers.values(), *self.scratches]
        return [buffer for buffer in known if buffer.slot < 0]

    # Values ---------------------------------------------------------------------------------------------------------

    def in_slot(self) -> Buffer:
        """A buffer that is a slot of its own."""
        self.slots += 1
        return Buffer(0, slot=self.slots - 1)

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
            tokens.turn_back(self, name, self.planes[name])
        if key not in self.buffers:
            source = self.maps[name, (1, 1), 0.0]
            buffer = self.buffers[key] = Buffer(meta.numel())
            batch, channels, height, width = source.shape

            def build(*_: Any) -> NativeOp:
                y = (buffer.slot, buffer.offset, contiguous_strides(source.shape))
                return nodes.copied(name, batch, place_of(source), y, (channels, height, width), None, self.target)

            self.steps.append(NativeStep(name, [source.buffer], buffer, build))
        return View(self.buffers[key], meta.storage_offset(), tuple(meta.shape), tuple(meta.stride()))

    def rows(self, name: str) -> View:
        """The value as contiguous rows; copied where it is not."""
        if self.values[name].is_contiguous():
            return self.plain(name)
        if name not in self.copies:
            meta = self.values[name].contiguous()
            view = pointwise.copied(self, name, meta)
            attributes = {"op": "aten.contiguous.default", "args": [{"ref": name}], "kwargs": {}}
            op = Op("torch", f"{name} contiguous", (name,), attributes)
            self.copies[name] = (meta, view or self.torch_step(op, meta))
        return self.copies[name][1]

    def map(
        self, name: str, padding: tuple[int, int] = (0, 0), stride: tuple[int, int] = (1, 1), border: float = 0.0,
        reach: int = 0,
    ) -> Map:  # fmt: skip
        """The value as a map with room for `padding` and `reach`, in phase planes where `stride` is given."""
        if name in self.positive and border < 0:
            border = 0.0  # a maximum over values that are not negative
        key = (name, stride, border)
        if key not in self.maps:
            self.convert(name, key)
        return self.maps[key].padded(padding, reach)

    def convert(self, name: str, key: tuple[str, tuple[int, int], float]) -> None:
        batch, channels, height, width = self.values[name].shape
        made = self.maps[key] = Map((batch, channels, height, width), key[1], key[2])
        self.copy_into(name, made, again=key[1:] != ((1, 1), 0.0))

    def copy_into(self, name: str, made: Map, first: int = 0, again: bool = True) -> None:
        """Copies the value into a map's channels from the `first` on; where it is one, and `again`, from its map."""
        source: Map | View | None = self.maps.get((name, (1, 1), 0.0)) if again else None
        if source is None:
            source = self.plain(name)
            source = source if source.stride[3] == 1 else self.rows(name)
        read, (batch, channels, height, width) = source, tuple(self.values[name].shape)

        def build(*_: Any) -> NativeOp:
            slot, offset, strides = place_of(made)
            y = slot, offset + made.layout.channel(first) * FLOAT_BYTES, strides
            return nodes.copied(name, batch, place_of(read), y, (channels, height, width), made.layout, self.target)

        self.steps.append(NativeStep(name, [source.buffer], made.buffer, build))

    def new_map(self, op: Op, shape: tuple[int, ...]) -> Map:
        """The map a native op writes."""
        self.define(op.output, shape)
        batch, channels, height, width = shape
        made = self.maps[op.output, (1, 1), 0.0] = Map((batch, channels, height, width), (1, 1), 0.0)
        name = op.attributes.get("name") if op.kind == "activation" else op.activation
        if name in NOT_NEGATIVE:
            self.positive.add(op.output)
        return made.padded((0, 0))

    def returned(self, name: str, outputs: dict[int, tuple[int, ...]]) -> View:
        """Where an output of the model lies; what native ops computed goes straight into a fresh tensor."""
        view, meta = self.plain(name), self.values[name]
        if view.buffer.slot < 0 and meta.is_contiguous() and 2 * meta.numel() >= view.buffer.size:
            view.buffer.slot = self.in_slot().slot
            whole = view.buffer.size == meta.numel()
            outputs[view.buffer.slot] = tuple(meta.shape) if whole else (view.buffer.size,)
        return view

    # Operations -----------------------------------------------------------------------------------------------------

    def lower_op(self, op: Op) -> None:
        if op.kind == "scalar":
            self.values[op.output] = evaluate_op(op, self.values, self.constants)
            return
        if op.kind == "adaptive_avg_pool2d":
            found = self.pooling(op)
            if found is None:
                return
            op = found
        rule, before = _RULES.get(op.kind), len(self.steps)
        fitting = op.kind == "torch" or all(is_float(self.values[name]) for name in op.inputs)
        if rule is not None and fitting and rule(self, op):
            # steps before it bring its inputs into the layouts it reads, one behind a layer its output into rows
            own = next((step for step in self.steps[before:] if getattr(step, "layer", None) is op), self.steps[-1])
            assert isinstance(own, NativeStep)
            own.op = op
            return
        meta = evaluate_op(op, self.values, self.constants)
        meta = settled(meta) if isinstance(meta, Tensor) else meta
        self.values[op.output] = meta
        if not isinstance(meta, Tensor):
            self.torch_step(op, meta)
            return
        for name in op.reads:
            source = self.values.get(name)
            if isinstance(source, Tensor) and storage_of(source) == storage_of(meta):
                self.plain(name)  # a view: nothing to run
                return
        if pointwise.is_copy(op) and pointwise.copied(self, op.inputs[0], meta):
            return
        self.torch_step(op, meta)

    def torch_step(self, op: Op, meta: Any) -> View:
        if not isinstance(meta, Tensor):
            raise AutopruneError(f"{op.kind} {op.attributes.get('op', '')} returns several tensors")
        reads = {}
        for name in op.reads:
            if isinstance(self.values[name], Tensor) and name not in self.constants:
                reads[name] = self.plain(name)
        buffer = self.buffers[storage_of(meta)] = self.in_slot()
        if op.kind == "torch" and self.is_known(op, meta):
            result = self.known[op.output] = self.computed(op)  # it depends on constants and shapes alone
            self.fixed[buffer.slot] = result
            return View(buffer, 0, tuple(meta.shape), tuple(meta.stride()))
        self.steps.append(TorchStep(op, reads, buffer.slot, tuple(meta.shape), tuple(meta.stride()), meta.dtype))
        return View(buffer, 0, tuple(meta.shape), tuple(meta.stride()))

    def is_known(self, op: Op, meta: Tensor) -> bool:
        """Whether a torch operation reads nothing that a call gives, and its result is not too large to be kept."""
        read = [name for name in op.reads if isinstance(self.values[name], Tensor)]
        given = [self.known.get(name, self.graph.constants.get(name)) for name in read]
        if any(value is None or value.is_meta for value in given):
            return False
        return meta.numel() <= max(FOLD_LIMIT, *(value.numel() for value in given if value is not None), 0) or not read

    def computed(self, op: Op) -> Tensor:
        """What such an operation gives."""
        a = op.attributes
        values = {**self.graph.constants, **self.known}
        known = {name: values.get(name, self.values[name]) for name in op.reads}
        result: Tensor = aten.bind(a["op"], a["args"], a["kwargs"], a.get("item"), known)({})
        return settled(result)

    def conv2d(self, op: Op) -> bool:
        a = op.attributes
        weight, x = self.constants[op.tensors["weight"]], op.inputs[0]
        batch, channels, height, width = self.values[x].shape
        stride, padding, dilation = ((a[key][0], a[key][1]) for key in ("stride", "padding", "dilation"))
        window = nodes.Window((weight.shape[2], weight.shape[3]), stride, padding, dilation)
        shape = (batch, weight.shape[0], *window.outputs(height, width))
        if channels != weight.shape[1] * a["groups"] or min(shape[1:]) < 1:
            raise AutopruneError(
                f"a convolution of {weight.shape[1] * a['groups']} channels by a {window.kernel} kernel takes no input "
                f"of shape {tuple(self.values[x].shape)}: its channels differ or it is smaller than the kernel."
            )
        self.same_shape(op, shape)
        if op.output not in self.weights:
            self.depthwise(op, window, shape)
            return True
        if self.skips(x, window):
            given, window = self.subsampled(x, window.stride), replace(window, stride=(1, 1))
        elif op.kind == "conv2d" and self.crowded(window, shape):
            given = self.map(x, (window.padding[0], 0), window.stride, reach=_reach(window))
        else:
            given = self.map(x, window.padding, window.stride)
        added = residual_of(op)
        residual = None if added is None else self.map(added)
        gate = self.factors(op, "gate", shape[1])
        live = self.factors(op, "live", channels)
        made = self.new_map(op, shape)
        gated = op.kind == "gated_conv2d"
        room, dead = (self.gated_room(op), self.dead(op)) if gated else (0, Dead.FINISHED)
        # as much as anything that tuning tries needs
        scratch = self.scratch(room if gated else convolutions.panel_scratch(max(GROUP_SIZES)))
        made.pitch.join(given.pitch)
        if residual is not None:
            made.pitch.join(residual.pitch)
            # A convolution looks around what it reads; and a row that stands in for a missing filter is written twice.
            if residual is not given and shape[1] // a["groups"] % max(GROUP_SIZES) == 0:
                made.over = residual

        def build(weights: Weights | None, tiling: nodes.Tiling) -> NativeOp:
            assert weights is not None
            other = None if residual is None else residual.at
            return convolutions.convolution(
                op.output, weights, window, op.activation, tiling, batch, given.at, made.at, other, scratch,
                self.target, convolutions.Gated(gate, live, dead, room) if gated else None,
            )  # fmt: skip

        reads = [given.buffer, scratch, *(each.buffer for each in (residual, gate, live) if each is not None)]
        positions = (shape[2] - 1) * (shape[3] + window.padding[1]) + shape[3]  # about: the pitch is not known yet
        self.steps.append(NativeStep(op.output, reads, made.buffer, build, op, (positions, batch)))
        return True

    def crowded(self, window: nodes.Window, shape: tuple[int, ...]) -> bool:
        """Whether a map is so small that its border's columns are too much to compute."""
        (height, width), lanes = shape[2:], self.target.lanes
        vectors = -(-((height - 1) * (width + window.padding[1]) + width) // lanes)
        whole, rest = divmod(height * width, lanes)
        return whole + min(1.0, rest / lanes) <= CROWDED * vectors and _reach(window) <= WIDEST_REACH

    def factors(self, op: Op, role: str, channels: int) -> convolutions.Factors | None:
        """Where the factors of a gated convolution's output or input channels lie."""
        if not op.attributes.get(role):
            return None
        view = self.rows(op.inputs[1] if role == "gate" else op.inputs[1 + op.attributes["gate"]])
        batch = self.values[op.inputs[0]].shape[0]
        if len(view.shape) != 2 or view.shape[0] != batch or view.shape[1] < 1 or channels % view.shape[1]:
            raise AutopruneError(f"{op.output!r} has factors of shape {view.shape} for {channels} channels of {batch}.")
        return convolutions.Factors(view.buffer, view.offset * FLOAT_BYTES, view.shape[1], channels // view.shape[1])

    def gated_room(self, op: Op) -> int:
        """Floats of scratch a thread needs for a gated convolution, however its weight is packed."""
        columns = self.constants[op.tensors["weight"]][0].numel()
        longest = np.diff(self.weights[op.output].packed.group_pointer).max(initial=0)
        return aligned(gated_scratch(max(columns, int(longest))))

    def dead(self, op: Op) -> Dead:
        """What becomes of the channels that a gated convolution silences."""
        finished = residual_of(op) is not None or op.activation not in (None, *KEEPS_ZERO)
        if finished or not op.attributes["gate"]:
            return Dead.FINISHED
        looking = [each for each in self.graph.ops if op.output in each.reads]
        skipping = [
            each for each in looking
            if each.attributes.get("live") and each.inputs.count(op.output) == 1 and each.inputs[0] == op.output
            and each.inputs[1 + each.attributes["gate"]] == op.inputs[1]
        ]  # fmt: skip
        unread = len(skipping) == len(looking) and op.output not in self.graph.output_names()
        return Dead.UNREAD if unread else Dead.ZEROS

    def gate(self, op: Op) -> bool:
        weight, bias, threshold = (
            self.graph.constants[op.tensors[role]] for role in ("weight", "bias", "threshold")
        )  # fmt: skip
        x = self.values[op.inputs[0]]
        if x.dim() != 4 or weight.dtype != torch.float32 or weight.is_meta or not x.shape[2] * x.shape[3]:
            return False
        if x.shape[1] != weight.shape[1]:
            raise AutopruneError(f"a gate takes {weight.shape[1]} channels, not an input of shape {tuple(x.shape)}.")
        given = self.map(op.inputs[0])
        meta = self.define(op.output, (x.shape[0], len(weight)))
        buffer = self.buffers[storage_of(meta)] = Buffer(meta.numel())
        scratch = self.scratch(gate_scratch(weight.shape[1], len(weight), self.target))
        arrays = [each.numpy() for each in (weight, bias, threshold)]

        def build(*_: Any) -> NativeOp:
            return convolutions.gate(
                op.output, x.shape[0], given.at, buffer, scratch, arrays, op.attributes["keep"], self.target
            )

        self.steps.append(NativeStep(op.output, [given.buffer, scratch], buffer, build))
        return True

    def skips(self, x: str, window: nodes.Window) -> bool:
        """Whether a convolution reads some positions alone, which no other needs in phase planes."""
        points = window.kernel == (1, 1) and window.padding == (0, 0) and window.stride != (1, 1)
        return points and window.stride[1] <= WIDEST_STRIDE and (x, window.stride, 0.0) not in self.maps

    def subsampled(self, x: str, stride: tuple[int, int]) -> Map:
        """Every `stride`-th position of the value, as a map of its own."""
        name = f"{x} by {stride[0]} {stride[1]}"
        if name not in self.values:
            given, window = self.map(x), nodes.Window((1, 1), stride, (0, 0), (1, 1))
            batch, channels, height, width = given.shape
            shape = (batch, channels, *window.outputs(height, width))
            self.define(name, shape)
            made = self.maps[name, (1, 1), 0.0] = Map(shape, (1, 1), 0.0)

            def build(*_: Any) -> NativeOp:
                return nodes.sliding(name, Mode.MAX, window, batch, given.at, made.at, self.target)

            self.steps.append(NativeStep(name, [given.buffer], made.buffer, build))
        return self.map(name)

    def scratch(self, floats: int) -> Buffer:
        """Room for every thread to work in."""
        self.scratches.append(Buffer(self.threads * floats))
        return self.scratches[-1]

    def same_shape(self, op: Op, shape: tuple[int, ...]) -> None:
        """Raises AutopruneError unless what is added, where there is something, has `shape`."""
        name = op.inputs[1] if op.kind == "add" else residual_of(op)
        if name is not None and tuple(self.values[name].shape) != shape:
            raise AutopruneError(
                f"{op.output!r} adds a value of shape {tuple(self.values[name].shape)} to one of {shape}."
            )

    def depthwise(self, op: Op, window: nodes.Window, shape: tuple[int, ...]) -> None:
        weight = self.graph.constants[op.tensors["weight"]]
        if not is_depthwise(op, weight) or weight.is_meta or weight.dtype != torch.float32:
            raise AutopruneError(f"the convolution {op.output!r} is neither packed nor depthwise in float32.")
        bias = self.graph.constants[op.tensors["bias"]] if "bias" in op.tensors else weight.new_zeros(weight.shape[0])
        self.slide(op, window, shape, Mode.DEPTHWISE, weights=weight.flatten(1).contiguous().numpy(),
                   bias=bias.contiguous().numpy(), activation=op.activation)  # fmt: skip

    def slide(
        self, op: Op, window: nodes.Window, shape: tuple[int, ...], mode: Mode, border: float = 0.0, **rest: Any
    ) -> None:
        given = self.map(op.inputs[0], window.padding, border=border)
        if op.inputs[0] in self.positive and mode is not Mode.DEPTHWISE:
            self.positive.add(op.output)
        made = self.new_map(op, shape)
        if window.stride == (1, 1):
            made.pitch.join(given.pitch)

        def build(*_: Any) -> NativeOp:
            return nodes.sliding(op.output, mode, window, shape[0], given.at, made.at, self.target, **rest)

        self.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build))

    def pool(self, op: Op) -> bool:
        a = op.attributes
        x = self.values[op.inputs[0]]
        dilation = a.get("dilation", [1, 1])
        kernel, stride, padding = ((a[key][0], a[key][1]) for key in ("kernel", "stride", "padding"))
        window = nodes.Window(kernel, stride, padding, (dilation[0], dilation[1]))
        wide = window.stride[1] > WIDEST_STRIDE or dilation[1] * (kernel[1] - 1) > WIDEST_POOL
        if x.dim() != 4 or wide:
            return False
        shape = (*x.shape[:2], *window.outputs(x.shape[2], x.shape[3]))
        if min(shape[1:]) < 1:
            raise AutopruneError(f"a pooling by a {window.kernel} kernel takes no input of shape {tuple(x.shape)}.")
        if op.kind == "max_pool2d":
            self.slide(op, window, shape, Mode.MAX, border=float("-inf"))
        else:
            self.slide(op, window, shape, Mode.AVERAGE, count_padding=bool(a["count_include_pad"]))
        return True

    def pooling(self, op: Op) -> Op | None:
        """An adaptive pooling as what it is for an input of this shape; None where it is nothing at all."""
        x, (source,) = self.values[op.inputs[0]], op.inputs
        output = op.attributes["output"]
        if x.dim() != 4 or any(extent % parts for extent, parts in zip(x.shape[2:], output, strict=True)):
            return op
        kernel = [extent // parts for extent, parts in zip(x.shape[2:], output, strict=True)]
        if kernel != [1, 1]:
            given = {"kernel": kernel, "stride": kernel, "padding": [0, 0], "count_include_pad": True}
            return replace(op, kind="avg_pool2d", attributes=given)
        self.values[op.output] = x
        self.maps |= {(op.output, *key[1:]): made for key, made in self.maps.items() if key[0] == source}
        self.positive |= {op.output} & ({op.output} if source in self.positive else set())
        return None

    def global_avg_pool(self, op: Op) -> bool:
        given = self.map(op.inputs[0])
        batch, channels, _, _ = given.shape
        meta = self.define(op.output, (batch, channels, 1, 1) if op.attributes["keepdim"] else (batch, channels))
        buffer = self.buffers[storage_of(meta)] = Buffer(meta.numel())

        def build(*_: Any) -> NativeOp:
            return nodes.mean(op.output, batch, given.at, buffer, self.target)

        self.steps.append(NativeStep(op.output, [given.buffer], buffer, build))
        return True

    def elementwise(self, op: Op) -> bool:
        """On maps, or on values that lie in rows."""
        shape = tuple(self.values[op.inputs[0]].shape)
        if not all((name, (1, 1), 0.0) in self.maps for name in op.inputs):
            return pointwise.in_rows(self, op)
        self.same_shape(op, shape)
        given = [self.map(name) for name in op.inputs]
        made = self.new_map(op, shape)
        for each in given:
            made.pitch.join(each.pitch)
        made.over = given[-1]
        activation = op.attributes["name"] if op.kind == "activation" else op.activation

        def build(*_: Any) -> NativeOp:
            other = given[1].at if len(given) > 1 else None
            return nodes.combine(op.output, shape[0], given[0].at, other, made.at, activation, self.target)

        self.steps.append(NativeStep(op.output, [each.buffer for each in given], made.buffer, build))
        return True


def _reach(window: nodes.Window) -> int:
    """How many columns beside a position a window looks at, at most."""
    return max(abs(dx) for _, dx in window.taps())


def _sharing(returned: Mapping[str, View], fixed: Collection[int]) -> frozenset[str]:
    """The results that must be copied: what lies in the arena or is `fixed`, and what another result holds too."""
    copied, held = set(), dict[int, list[tuple[int, int]]]()
    for name, view in returned.items():
        last = view.start + sum((extent - 1) * step for extent, step in zip(view.shape, view.stride, strict=True))
        others = held.setdefault(view.buffer.slot, [])
        if (
            view.buffer.slot == ARENA
            or view.buffer.slot in fixed
            or any(a <= last and view.start <= z for a, z in others)
        ):
            copied.add(name)
        else:
            others.append((view.start, last))
    return frozenset(copied)


_RULES: Mapping[str, Callable[[Lowering, Op], bool]] = {
    "conv2d": Lowering.conv2d,
    "gated_conv2d": Lowering.conv2d,
    "gate": Lowering.gate,
    "linear": tokens.linear,
    "recurrent": tokens.recurrent,
    "max_pool2d": Lowering.pool,
    "avg_pool2d": Lowering.pool,
    "layer_norm": tokens.layer_norm,
    "attention": tokens.attention,
    "global_avg_pool": Lowering.global_avg_pool,
    "activation": Lowering.elementwise,
    "add": Lowering.elementwise,
    "torch": pointwise.torch_operator,
}
"""Kind -> the rule that lowers it to native ops; False when torch has to run it."""
