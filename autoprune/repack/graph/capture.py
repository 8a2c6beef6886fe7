"""Capturing a model: torch.export -> our graph.

The exported program is functional (nothing is written in place) and keeps convolutions, norms and attention whole.
What `importer` has no kind for stays a torch operator; what no file could hold is a CaptureError.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from autoprune.model.arguments import Arguments
from autoprune.model.channel_gates import gates
from autoprune.model.copies import copy_for_inference, has_memory, own_copy
from autoprune.model.recurrent.modules import WholeSequences, recurrent_modules
from autoprune.repack.graph import aten, importer, torch_export
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.calls import ByPlace, Place, in_model, input_names
from autoprune.repack.graph.editor import infer_shapes
from autoprune.repack.graph.freedom import Extents
from autoprune.repack.graph.importer import Alias, Lifted, Site
from autoprune.repack.graph.ir import FOLD_LIMIT, Graph, Op, renamed
from autoprune.repack.graph.reference import SCALARS, evaluate_op, reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.graph.torch_export import Axes, CaptureError
from autoprune.repack.outputs import same_output
from autoprune.tracing import tracing, unloadable

__all__ = ["CaptureError", "capture"]

_SCALARS: Mapping[Any, str] = {
    operator.add: "add",
    operator.mul: "mul",
    operator.sub: "sub",
    operator.floordiv: "floordiv",
}
_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29)
_PLACES = ("device", "layout", "pin_memory", "memory_format")  # arguments that say where, not what
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def capture(model: nn.Module, inputs: Any) -> Graph:
    """Captures what `model` computes in eval mode, for inputs of any extents where the model allows it.

    Args:
        model: left as it is.
        inputs: what the model is called with, see `Arguments`. Which extents of its tensors may change, and which only
            together, is what torch.export finds the model to allow; those that cannot be captured free are fixed.

    Raises:
        CaptureError: its control flow depends on data, it writes to its inputs or buffers, draws random numbers,
            or takes or returns what is no tensor, list, tuple or dictionary.
    """
    arguments = Arguments.of(inputs).ordered(model)
    tensors = arguments.tensors
    for x in tensors:
        if not has_memory(x) or x.device.type != "cpu" or x.layout != torch.strided:
            raise CaptureError(f"only dense tensors on the CPU can be inputs of a program, not {_describe(x)}.")
    if reason := unloadable():
        raise CaptureError(reason)
    copied = copy_for_inference(model)
    recurrent = [module for _, module in recurrent_modules(copied)]
    names = input_names(copied, arguments)
    by_place = ByPlace(_whole_operators(copied), arguments)
    with tracing():  # all of it: symbolic extents also ask what other threads trace
        for free in _freedoms(tensors, bool(recurrent)):
            for grown in _growths(tensors, recurrent, free):
                try:
                    return _captured(by_place, names, tensors, free, grown)
                except _OtherThanGrown:
                    continue
                except CaptureError:  # it is made for some extents
                    if not any(free):
                        raise
    raise AssertionError("the last freedom is none")


class _OtherThanGrown(CaptureError):
    """A graph that was captured at larger extents than the examples', at which it computes something else."""


def _freedoms(inputs: Sequence[Tensor], recurrent: bool) -> Iterator[list[Axes]]:
    """Which axes of each input may become free, from all to none."""
    every: list[Axes] = [range(x.ndim) for x in inputs]
    first = tuple(inputs[0].shape[: 1 + recurrent]) if inputs else ()
    sequences: list[Axes] = [[a for a, extent in enumerate(x.shape) if extent in first] for x in inputs]
    batch: list[Axes] = [[0] if first and x.shape[:1] == first[:1] else [] for x in inputs]
    for free in (every, sequences, batch):
        if any(free):
            yield free
    yield [()] * len(inputs)


def _growths(
    inputs: Sequence[Tensor], recurrent: Sequence[nn.LSTM | nn.GRU], free: Sequence[Axes]
) -> Iterator[dict[Place, int]]:
    """Which free axes of extent 1 or 0 are captured at 2, so that they are not fixed: from most to none."""
    tried = []
    for wide in (True, False, None):
        axes = () if wide is None else _grown(inputs, recurrent, wide)
        grown = {(x, axis): 2 for x, each in enumerate(axes) for axis in each}
        grown = {place: 2 for place in grown if place[1] in free[place[0]] and inputs[place[0]].shape[place[1]] < 2}
        if grown not in tried:
            tried.append(grown)
            yield grown


def _grown(inputs: Sequence[Tensor], recurrent: Sequence[nn.LSTM | nn.GRU], wide: bool) -> list[Axes]:
    """The axes of each input that are a batch's or a sequence's; `wide`: also where there only may be steps."""
    states = {(m.num_layers * (1 + m.bidirectional), m.hidden_size) for m in recurrent}

    def of(x: Tensor) -> Axes:
        """A state before the first step has its batch on the second axis."""
        if x is not inputs[0] and x.ndim == 3 and (x.shape[0], x.shape[2]) in states:
            return [1]
        features = x.is_floating_point() and x.ndim > 1  # lie on the last axis
        axes = range(min(1 + (bool(recurrent) or (wide and x.ndim < 4)), x.ndim - features))
        return [axis for axis in axes if x.shape[axis : axis + 1] == inputs[0].shape[axis : axis + 1]]

    return [of(x) for x in inputs]


def _whole_operators(model: nn.Module) -> nn.Module:
    """Makes gates and recurrent directions operators, which torch.export would take apart; changes all but the root."""
    for gate in gates(model).values():
        gate.whole = gate.kept
    for name, module in list(recurrent_modules(model)):
        if not name:
            return WholeSequences(module)
        model.set_submodule(name, WholeSequences(module))
    return model


def _describe(x: Any) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return "a nested tensor" if x.is_nested else f"a tensor on {x.device} with layout {x.layout}"


def _captured(
    model: ByPlace, names: Sequence[str], inputs: Sequence[Tensor], free: Sequence[Axes], grown: Mapping[Place, int],
    tied: Sequence[Sequence[Place]] = (),
) -> Graph:  # fmt: skip
    """The graph with those of the axes `free` that torch leaves free.

    Axes are captured at the extents that `grown` has for them, the examples' else; each group of those `tied` is one.
    """
    model.tied = tied
    grown = {(x, axis): extent for (x, axis), extent in grown.items() if axis in free[x]}
    program = torch_export.export(model, inputs, free, grown)
    known = Extents(torch_export.user_inputs(program))
    pinned = known.pinned()
    fixed = [(x, axis) for x, own in enumerate(free) for axis in own if known.axes[x].get(axis) in {None, *pinned}]
    if tied and all(place in fixed for group in tied for place in group):
        raise CaptureError("the model fixes these extents, alone and together.")
    others: list[tuple[Mapping[Place, int], Sequence[Sequence[Place]]]] = []
    others += [(grown, groups) for groups in _ties(inputs, fixed)] if not tied else []
    if all(extent == 2 for extent in grown.values()):  # else tried
        numbers = {place: known.axes[place[0]].get(place[1]) for place in _steps(inputs, fixed)}
        unlike = _unlike_extents(inputs, {place: n for place, n in numbers.items() if n is not None})
        others += [({**grown, **unlike}, tied)] if unlike else []
    for extents, groups in others:
        try:
            return _captured(model, names, inputs, free, extents, groups)
        except CaptureError:  # no freer so
            continue
    if pinned or any(place in grown for place in fixed):  # the program holds another extent in their place
        left = [[axis for axis in own if (x, axis) not in fixed] for x, own in enumerate(free)]
        return _captured(model, names, inputs, left, grown, tied)
    graph = _translated(program, names, inputs, model.returned.structure)
    try:
        infer_shapes(graph)
    except FAILURES as error:
        raise CaptureError(f"the captured graph does not run at other extents: {error}.") from error
    if grown and not _computes(graph, model, inputs):
        raise _OtherThanGrown("the model takes another way for larger inputs than for the examples.")
    return graph


def _steps(inputs: Sequence[Tensor], places: Sequence[Place]) -> list[Place]:
    """Those that are a batch's axis, or a sequence's."""
    found = []
    for number, axis in places:
        features = inputs[number].is_floating_point() and inputs[number].ndim > 1
        if axis < min(2 if inputs[number].ndim < 4 else 1, inputs[number].ndim - features):
            found.append((number, axis))
    return found


def _ties(inputs: Sequence[Tensor], fixed: Sequence[Place]) -> Iterator[list[list[Place]]]:
    """Axes of batches and sequences that torch fixes and that may have one extent: those of one place, or all."""
    found = []
    for same_place in (True, False):
        groups: dict[Any, list[Place]] = {}
        for number, axis in _steps(inputs, fixed):
            groups.setdefault((inputs[number].shape[axis], axis if same_place else 0), []).append((number, axis))
        several = [group for group in groups.values() if len({number for number, _ in group}) > 1]
        if several and several not in found:
            found.append(several)
            yield several


def _unlike_extents(inputs: Sequence[Tensor], numbers: Mapping[Place, int]) -> dict[Place, int]:
    """An extent for each number that divides nothing: torch may have fixed the example's for what it divides."""
    taken = {extent for x in inputs for extent in x.shape}
    primes = (each for each in _PRIMES if each not in taken)
    extents = dict(zip(sorted(set(numbers.values())), primes, strict=False))
    return {place: extents[number] for place, number in numbers.items() if number in extents}


def _translated(program: ExportedProgram, names: Sequence[str], inputs: Sequence[Tensor], returned: Any) -> Graph:
    if torch_export.is_functional(program.graph):
        try:
            return validate(_Translation(program, names, inputs, returned).graph())
        except CaptureError:  # an operator that is one of several simpler ones
            pass
    return validate(_Translation(torch_export.functional(program), names, inputs, returned).graph())


def _computes(graph: Graph, model: ByPlace, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph gives on the examples what the model does; not asked where states are cut at a threshold."""
    if any(op.attributes["threshold"] or op.attributes["keep"] for op in graph.ops if op.kind == "recurrent"):
        return True
    flat = replace(graph, outputs={"list": graph.output_names()})
    try:
        with torch.inference_mode():
            pairs = model(*map(own_copy, inputs)), reference(flat, tuple(map(own_copy, inputs)))
    except FAILURES:
        return False
    wanted, got = ([x for x in each if isinstance(x, Tensor)] for each in pairs)
    return same_output(got, wanted)


def _unlike(names: Sequence[str], taken: set[str]) -> list[str]:
    """The names, changed where they are taken."""
    found: list[str] = []
    for name in names:
        while name in taken or name in found:
            name += "_"
        found.append(name)
    return found


class _Translation:
    """One pass over an exported program; `graph` gives the result."""

    def __init__(self, program: ExportedProgram, names: Sequence[str], inputs: Sequence[Tensor], returned: Any) -> None:
        self.program, self.returned = program, returned
        nodes = torch_export.user_inputs(program)
        self.extents = Extents(nodes)
        self.inputs = tuple(self.extents.described(inputs, _unlike(names, {x.name for x in program.graph.nodes})))
        self.input_names = dict(zip((node.name for node in nodes), (x.name for x in self.inputs), strict=True))
        self.ops: list[Op] = []
        self.constants: dict[str, Tensor] = {}
        self.names: dict[fx.Node, str] = {}  # of the value or constant that stands for a node
        self.batches: dict[str, tuple[str, int]] = {}  # symbolic extent -> the input and axis it comes from
        self.sizes: dict[str, str] = {}  # symbolic extent -> name
        self.asserted: list[Any] = []  # conditions that stand in the graph
        self.taken = {node.name for node in program.graph.nodes}
        self.outputs: Any = None

    def graph(self) -> Graph:
        for spec in self.program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise CaptureError("the model writes to its inputs or its buffers, which a program cannot.")
        weights = self.weights()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node, weights)
            elif node.op == "call_function":
                self.translate(node)
            elif node.op == "output":
                self.outputs = self.structure(node.args[0])
            else:
                raise CaptureError(f"the model holds a {node.op} ({node.target}), which a program cannot.")
        read = {name for op in self.ops for name in (*op.reads, *op.tensors.values())}
        conditions = self.extents.conditions(self.inputs, self.asserted)  # the last: translating may ask for more
        graph = Graph(self.inputs, tuple(self.ops), self.outputs, self.constants, conditions)
        read |= set(graph.output_names())
        return replace(graph, constants={name: value for name, value in self.constants.items() if name in read})

    def placeholder(self, node: fx.Node, weights: Mapping[str, tuple[str, Tensor]]) -> None:
        self.names[node] = self.input_names.get(node.name, node.name)
        if node.name in weights:
            self.names[node] = self.constant(*weights[node.name])
            return
        for axis, extent in enumerate(importer.extents(node)):
            if isinstance(extent, str):
                self.batches.setdefault(extent, (self.names[node], axis))

    def weights(self) -> dict[str, tuple[str, Tensor]]:
        """Placeholder -> (qualified name, tensor) of each parameter, buffer and literal tensor."""
        found = {}
        for spec in self.program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                continue
            target = spec.target
            held = {**self.program.constants, **self.program.state_dict}
            if spec.kind not in _WEIGHTS or target is None or not isinstance(held.get(target), Tensor):
                raise CaptureError(f"the model reads {spec.arg}, which is neither a tensor nor a weight.")
            found[spec.arg.name] = (in_model(target), held[target])
        return found

    def constant(self, name: str, value: Tensor) -> str:
        """Adds a constant and returns the name it got."""
        while name in self.taken or name in self.constants:
            name += "_"
        if value.device.type != "cpu" or value.layout != torch.strided:
            raise CaptureError(f"only dense tensors on the CPU can be weights of a program, not {_describe(value)}.")
        self.constants[name] = value.detach().contiguous()
        return name

    def translate(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target in _SCALARS or node.target is torch.ops.aten.sym_size.int:
            self.scalar(node)
        elif isinstance(value, torch.SymInt):
            self.names[node] = self.extent(value)
        elif isinstance(value, (torch.SymBool, torch.SymFloat)):
            pass  # what reads it says that it cannot
        elif node.target is torch.ops.aten._assert_scalar.default:
            self.asserted += [node.args[0].meta["val"]] if isinstance(node.args[0], fx.Node) else []
        elif node.target is operator.getitem:
            self.getitem(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            self.operator(node, node.target)
        else:
            raise CaptureError(f"the model uses {node.target}, which a program cannot.")

    def scalar(self, node: fx.Node) -> None:
        args = [self.names[x] if isinstance(x, fx.Node) else x for x in node.args]
        fn = _SCALARS.get(node.target, "size")
        if any(type(x) not in (str, int) for x in args):
            raise CaptureError(f"the model computes {node.name} from {args}, which a program cannot.")
        read = tuple(dict.fromkeys(x for x in args if isinstance(x, str)))
        self.emit(node, Op("scalar", node.name, read, {"fn": fn, "args": args}))
        self.sizes.setdefault(str(node.meta["val"]), node.name)

    def getitem(self, node: fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, fx.Node)
        if source in self.names:  # a batch norm, whose other results are empty outside training
            self.names[node] = self.names[source]
            return
        assert isinstance(source.target, torch._ops.OpOverload)
        if not isinstance(node.meta.get("val"), Tensor):
            raise CaptureError(f"the model uses the operator {source.target}, which a program cannot.")
        self.emit(node, replace(self.as_torch(source, source.target), output=node.name).with_attributes(item=index))

    def operator(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return
        target, bound = torch_export.IN_PLACE.get(target, target), _bind(node, target)
        if bound.get("dropout_p"):
            raise CaptureError(f"the model draws random numbers ({target}), which a program cannot.")
        if importer.lifts(target):
            lifted = importer.lift(target, Site(self, node, bound))
            if isinstance(lifted, Alias):
                self.names[node] = lifted.name
                return
            if isinstance(lifted, Lifted):
                self.emit(node, Op(lifted.kind, node.name, lifted.inputs, lifted.attributes, lifted.tensors))
                return
        if not aten.is_allowed(target):
            raise CaptureError(f"the model uses the operator {target}, which a program cannot.")
        if isinstance(node.meta.get("val"), (tuple, list)):
            return  # each of its results becomes an operation of its own
        if not self.folded(node, target):
            self.emit(node, self.as_torch(node, target))

    def as_torch(self, node: fx.Node, target: torch._ops.OpOverload) -> Op:
        for argument in (*node.args, *node.kwargs.values()):
            if isinstance(argument, torch.device) and argument.type != "cpu":
                raise CaptureError(f"the model uses the device {argument}; a program runs on the CPU.")
        args = [self.encode(x) for x in node.args]
        kwargs = {key: self.encode(value) for key, value in node.kwargs.items() if key not in _PLACES}
        read = tuple(dict.fromkeys(aten.references([args, list(kwargs.values())])))
        return Op("torch", node.name, read, _torch(aten.operator_name(target), args, kwargs))

    def encode(self, value: Any) -> Any:
        """An operator's argument as JSON."""
        if isinstance(value, fx.Node):
            if value not in self.names:
                raise CaptureError(f"the model computes {value.name} from its inputs' shapes, which a program cannot.")
            return {"ref": self.names[value]}
        if isinstance(value, (list, tuple)):
            return [self.encode(each) for each in value]
        if isinstance(value, torch.dtype):
            try:
                return {"dtype": aten.encode_dtype(value)}
            except KeyError:
                raise CaptureError(f"the model uses tensors of type {value}, which a program cannot.") from None
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            return aten.encode_number(value)
        raise CaptureError(f"the model passes {value!r} to an operator, which a program cannot hold.")

    def folded(self, node: fx.Node, target: torch._ops.OpOverload) -> bool:
        """Computes now what depends on constants alone, unless that would blow them up."""
        read = node.all_input_nodes
        value = node.meta.get("val")
        if any(self.names[x] not in self.constants for x in read) or not isinstance(value, Tensor):
            return False
        if not all(isinstance(extent, int) for extent in importer.extents(node)):
            return False
        if value.numel() > max(FOLD_LIMIT, sum(self.constants[self.names[x]].numel() for x in read)):
            return False
        op = self.as_torch(node, target)
        with torch.no_grad():
            computed = evaluate_op(op, {}, self.constants)
        assert isinstance(computed, Tensor)
        self.names[node] = self.constant(f"{node.name}.folded", computed.clone())
        return True

    def size(self, node: fx.Node, axis: int) -> str:
        """The name of an extent that depends on the batch; emitted unless one like it is known already."""
        extent = str(node.meta["val"].shape[axis])
        if extent not in self.sizes:
            source, axis = self.batches.get(extent, (self.names[node], axis))
            self.sizes[extent] = name = f"{source}.size{axis}"
            self.ops.append(Op("scalar", name, (source,), {"fn": "size", "args": [source, axis]}))
        return self.sizes[extent]

    def extent(self, extent: torch.SymInt | int) -> str:
        """The name of an extent that is computed of the inputs'."""
        places = {
            number: (each.name, axis) for each in reversed(self.inputs) for axis, number in each.free_axes.items()
        }
        wanted = self.extents.written(extent)

        def emitted(expression: Any) -> int | str:
            if isinstance(expression, int):
                return expression
            if isinstance(expression, dict):
                return self.scalar_op("size", list(places[expression["extent"]]))
            fn, *operands = expression
            first, *rest = map(emitted, operands)
            for each in rest:
                first = self.scalar_op(fn, [first, each])
            return first

        text = str(extent)
        if text not in self.sizes:
            made = emitted(wanted)
            self.sizes[text] = made if isinstance(made, str) else self.scalar_op("add", [made, 0])
        return self.sizes[text]

    def scalar_op(self, fn: str, args: list[Any]) -> str:
        """The name of an integer; emitted unless it is there already."""
        known = next((op for op in self.ops if op.kind == "scalar" and op.attributes == {"fn": fn, "args": args}), None)
        if known is not None:
            return known.output
        name = f"{fn}.{len(self.ops)}"
        read = tuple(dict.fromkeys(x for x in args if isinstance(x, str)))
        if fn not in SCALARS:
            raise CaptureError(f"the model computes an extent by {fn}, which a program cannot.")
        self.ops.append(Op("scalar", name, read, {"fn": fn, "args": args}))
        return name

    def emit(self, node: fx.Node, op: Op) -> None:
        self.ops.append(op)
        self.names[node] = op.output

    def structure(self, leaves: Any) -> Any:
        """The outputs in the form `Graph.outputs` describes."""
        names = [self.names[x] if isinstance(x, fx.Node) else x for x in leaves]
        return renamed(self.returned, {str(number): name for number, name in enumerate(names)})


def _torch(name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"op": name, "args": args, "kwargs": kwargs}


def _bind(node: fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """An operator's arguments by name, defaults filled in."""
    schema = target._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound |= dict(zip((argument.name for argument in schema), node.args, strict=False))
    return bound | dict(node.kwargs)
