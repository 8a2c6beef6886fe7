"""From an exported program to our graph, node by node."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from autoprune.repack.graph import aten, importer, torch_export
from autoprune.repack.graph.allowed import fault, is_allowed
from autoprune.repack.graph.calls import in_model
from autoprune.repack.graph.freedom import Extents
from autoprune.repack.graph.integers import Integers
from autoprune.repack.graph.ir import FOLD_LIMIT, Graph, renamed
from autoprune.repack.graph.ops import Op, Scalar, TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.graph.site import Alias, Site, extents
from autoprune.repack.graph.torch_export import CaptureError

_SCALARS: Mapping[Any, str] = {
    operator.add: "add",
    operator.mul: "mul",
    operator.sub: "sub",
    operator.floordiv: "floordiv",
}
_PLACES = ("device", "layout", "pin_memory", "memory_format")  # arguments that say where, not what
# Memory that a model fills itself: what it holds before is nobody's wish. And what is set to zero in place.
_ZEROS: Mapping[Any, torch._ops.OpOverload] = {
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
    torch.ops.aten.zero.default: torch.ops.aten.zeros_like.default,
}
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def translated(program: ExportedProgram, names: Sequence[str], inputs: Sequence[Tensor], returned: Any) -> Graph:
    """An exported program as a graph.

    Args:
        program: functional.
        names: of its inputs.
        inputs: the examples.
        returned: the structure of what the model returns, its tensors numbered.

    Raises:
        CaptureError: it does what no graph can hold.
    """
    return _Translation(program, names, inputs, returned).graph()


def describe(x: Any) -> str:
    """A tensor that no program takes, or the type of anything else."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return "a nested tensor" if x.is_nested else f"a tensor on {x.device} with layout {x.layout}"


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
        self.integers = Integers(self.ops, self.inputs, self.extents)
        self.asserted: list[Any] = []  # conditions that stand in the graph
        self.taken = {x.name for x in self.inputs} | {node.name for node in program.graph.nodes}
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
        for axis, extent in enumerate(extents(node)):
            if isinstance(extent, str):
                self.integers.comes_from(extent, self.names[node], axis)

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
            raise CaptureError(f"only dense tensors on the CPU can be weights of a program, not {describe(value)}.")
        self.constants[name] = value.detach().contiguous()
        return name

    def translate(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target in _SCALARS or node.target is torch.ops.aten.sym_size.int:
            self.scalar(node)
        elif isinstance(value, torch.SymInt):
            self.names[node] = self.integers.extent(value)
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
        args: list[Any] = [self.names[x] if isinstance(x, fx.Node) else x for x in node.args]
        fn = _SCALARS.get(node.target, "size")
        if any(type(x) not in (str, int) for x in args):
            raise CaptureError(f"the model computes {node.name} from {args}, which a program cannot.")
        self.emit(node, Scalar.of(node.name, fn, tuple(args)))
        self.integers.is_named(node.meta["val"], node.name)

    def getitem(self, node: fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if source in self.names:  # of its results nobody reads another: those of a batch norm are empty, as a rule
            self.names[node] = self.names[source]
            return
        assert isinstance(source.target, torch._ops.OpOverload)
        if not isinstance(node.meta.get("val"), Tensor):
            raise CaptureError(f"the model uses the operator {source.target}, which a program cannot.")
        op = replace(self.as_torch(source, source.target), output=node.name, item=index)
        if not self.folded(node, op):
            self.emit(node, op)

    def operator(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return
        if target in _ZEROS and any(user.op == "output" for user in node.users):
            raise CaptureError("the model returns memory that it has not filled.")
        target = torch_export.IN_PLACE.get(target) or _ZEROS.get(target, target)
        bound = _bind(node, target)
        if bound.get("dropout_p"):
            raise CaptureError(f"the model draws random numbers ({target}), which a program cannot.")
        if importer.lifts(target):
            lifted = importer.lift(target, Site(self, node, bound))
            if isinstance(lifted, Alias):
                self.names[node] = lifted.name
                return
            if lifted is not None:
                for each in lifted if isinstance(lifted, tuple) else (lifted,):
                    self.emit(node, each)
                return
        if reason := _refusal(target, bound):
            raise CaptureError(reason)
        if isinstance(node.meta.get("val"), (tuple, list)):
            return  # each of its results becomes an operation of its own
        op = self.as_torch(node, target)
        if not self.folded(node, op):
            self.emit(node, op)

    def as_torch(self, node: fx.Node, target: torch._ops.OpOverload) -> TorchOp:
        for argument in (*node.args, *node.kwargs.values()):
            if isinstance(argument, torch.device) and argument.type != "cpu":
                raise CaptureError(f"the model uses the device {argument}; a program runs on the CPU.")
        args = tuple(self.encode(x) for x in node.args)
        kwargs = {key: self.encode(value) for key, value in node.kwargs.items() if key not in _PLACES}
        return TorchOp.of(node.name, aten.operator_name(target), args, kwargs)

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

    def folded(self, node: fx.Node, op: TorchOp) -> bool:
        """Computes now what depends on constants alone, unless that would blow them up."""
        value = node.meta.get("val")
        if any(name not in self.constants for name in op.reads) or not isinstance(value, Tensor):
            return False
        if not all(isinstance(extent, int) for extent in extents(node)):
            return False
        if value.numel() > max(FOLD_LIMIT, sum(self.constants[name].numel() for name in op.reads)):
            return False
        with torch.no_grad():
            computed = evaluate_op(op, {}, self.constants)
        assert isinstance(computed, Tensor)
        self.names[node] = self.constant(f"{node.name}.folded", computed.clone())
        return True

    def emit(self, node: fx.Node, op: Op) -> None:
        self.ops.append(op)
        self.names[node] = op.output

    def structure(self, leaves: Any) -> Any:
        """The outputs in the form `Graph.outputs` describes."""
        names = [self.names[x] if isinstance(x, fx.Node) else x for x in leaves]
        return renamed(self.returned, {str(number): name for number, name in enumerate(names)})


def _refusal(target: torch._ops.OpOverload, bound: Mapping[str, Any]) -> str:
    """Why no program can hold a call of an operator with these arguments by name; empty where one can."""
    if not is_allowed(target):
        return f"the model uses the operator {target}, which a program cannot."
    indices = bound["indices"] if target is torch.ops.aten.index.Tensor else ()
    if any(aten.is_mask(each.meta["val"]) for each in indices if each):
        return "the model picks values by a mask: how many there are depends on the values, which no program can."
    reason = fault(aten.operator_name(target), bound)
    return f"the model {reason}, which a program cannot." if reason else ""


def _bind(node: fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """An operator's arguments by name, defaults filled in."""
    schema = target._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound |= dict(zip((argument.name for argument in schema), node.args, strict=False))
    return bound | dict(node.kwargs)
