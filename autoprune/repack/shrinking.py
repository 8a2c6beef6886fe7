"""`shrink`: a model whose channels are dead -> the same model with fewer channels, plain torch.

The model's graph tells which channels are dead and which belong together; the modules that compute and read them are
cut. The model's own code stays, so what it does with a number of channels that it holds itself shows when it is run:
nothing is returned that does not compute what the masked model does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.masks import Masks, apply_masks_
from autoprune.model.arguments import Arguments
from autoprune.model.copies import check_inputs, copy_for_inference, deep_copy, not_running, settle_, uncompiled_
from autoprune.model.inventory import eval_mode
from autoprune.model.resize import obstacles, resize_
from autoprune.repack.graph.borders import fold_border
from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.capture import CaptureError, capture
from autoprune.repack.graph.channels import Channels
from autoprune.repack.graph.editor import Editor
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Conv2d, Linear, Op, TorchOp, Values
from autoprune.repack.graph.ops.attributes import Number
from autoprune.repack.graph.ops.base import Roles
from autoprune.repack.outputs import same_output
from autoprune.repack.probes import agrees, fresh
from autoprune.repack.weights.batch_norm import affine

_NORM = "aten.batch_norm.default"
_UNTRIED = "others are tried first"


@dataclass(frozen=True)
class ShrunkLayer:
    """What became of one module with weights.

    Attributes:
        kind: its class.
        before: the shape of its weight.
        after: likewise, in the smaller model.
        why: why it is as large as before; empty where it is smaller.
    """

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    why: str


class Shrunk(NamedTuple):
    """What `shrink` gives.

    Attributes:
        model: the smaller model.
        report: a row for each module with weights.
    """

    model: nn.Module
    report: tuple[ShrunkLayer, ...]


def shrink(model: nn.Module, example_inputs: Any, masks: Masks | None = None) -> Shrunk:
    """Cuts the channels out of a model that nothing needs: filters of zeros, and those that all readers have zeros for.

    Where a dead channel holds a constant, the bias of what reads it takes that over. Only plain `nn.Conv1d`,
    `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm1d` and `nn.BatchNorm2d` are cut; zeros that are no whole channels stay.

    Args:
        model: any module with zeros in its weights; left as it is.
        example_inputs: as the model is called; see `repack`.
        masks: applied first when given.

    Returns:
        A copy of the model, of the same classes, with smaller weights: it can be trained, saved and exported as before.
        In eval mode it computes what the masked model does on the examples and on other values.

    Raises:
        AutopruneError: the model does not run on its example inputs, or its graph cannot be captured.
    """
    original = copy_for_inference(model)
    masked = uncompiled_(deep_copy(model))
    if masks:
        apply_masks_(original, masks)
        apply_masks_(settle_(masked), masks)
    original = uncompiled_(original)
    arguments = Arguments.of(example_inputs).ordered(original)
    check_inputs(arguments.tensors)
    try:
        with torch.inference_mode():
            wanted = arguments.by_place(original)(*fresh(arguments.tensors))
    except Exception as error:  # the model is the user's: it may raise anything
        raise not_running(error) from error
    try:
        graph = capture(original, arguments)
    except CaptureError as error:
        raise AutopruneError(f"the model cannot be shrunk, since its graph cannot be captured: {error}") from error
    return _Shrinking(original, masked, arguments, wanted, graph).result()


class _Shrinking:
    """The work of one `shrink`.

    Attributes:
        edited: the captured graph, whose constants are the model's own tensors.
        whole: values of it that keep their channels -> why.
    """

    def __init__(self, original: nn.Module, masked: nn.Module, arguments: Arguments, wanted: Any, graph: Graph) -> None:
        self.original, self.masked, self.arguments, self.wanted = original, masked, arguments, wanted
        self.graph, self.obstacles = graph, obstacles(masked)

    def result(self) -> Shrunk:
        """Cuts everything at once; where the smaller model computes something else, one bundle after the other."""
        small, cuts = self.attempt({})
        refused: dict[str, str] = {}
        if isinstance(small, str):
            done: set[str] = set()
            for root in sorted(cuts.roots):
                untried = dict.fromkeys(cuts.roots - done - {root}, _UNTRIED)
                fault, _ = self.attempt({**untried, **refused})
                if isinstance(fault, str):
                    refused[root] = fault
                else:
                    done.add(root)
            small, cuts = self.attempt(refused)
        if isinstance(small, str):
            raise AutopruneError(f"a copy of the model does not compute what the model does: {small}.")
        return Shrunk(small, tuple(self.report(small, cuts)))

    def attempt(self, refused: Mapping[str, str]) -> tuple[nn.Module | str, _Cuts]:
        """The smaller model, or what is wrong with it; the bundles `refused` stay whole."""
        cuts = _Cuts(self.graph, self.masked, self.obstacles, refused)
        small = deep_copy(self.masked)
        resize_(small, {**_tensors(small), **cuts.tensors})
        return self.fault(small) or small, cuts

    def fault(self, small: nn.Module) -> str:
        """In what the smaller model differs from the masked one; empty where it computes the same."""
        inputs, call = self.arguments.tensors, self.arguments.by_place(small)
        try:
            with eval_mode(small), torch.inference_mode():
                same = same_output(call(*fresh(inputs)), self.wanted)
                same = same and agrees(self.arguments.by_place(self.original), call, inputs) is True
        except Exception as error:  # the model's own code, at sizes it was not made for
            return f"the model's code does not run without them: {str(error).strip().partition(chr(10))[0]}"
        return "" if same else "the model computes something else without them"

    def report(self, small: nn.Module, cuts: _Cuts) -> list[ShrunkLayer]:
        rows = []
        for name, obstacle in self.obstacles.items():
            before, after = (_shape(model.get_submodule(name)) for model in (self.masked, small))
            why = "" if before != after else obstacle or cuts.why(name)
            kind = type(self.masked.get_submodule(name)).__name__
            rows.append(ShrunkLayer(name, kind, before, after, why))
        return rows


class _Cuts:
    """The channels that a graph loses, until none is left that can go.

    Attributes:
        roots: the bundles that lost some, each by a value of it.
        tensors: what becomes of the tensors that are cut, by their names in the model.
    """

    def __init__(
        self, graph: Graph, model: nn.Module, obstacles: Mapping[str, str], refused: Mapping[str, str]
    ) -> None:
        self.edited, self.obstacles = Editor(graph), obstacles
        for op in list(self.edited.ops.values()):
            fold_border(self.edited, op)
        self.modules = _as_modules(self.edited, model)
        whole, uses = dict(refused), Counter(self.modules.values())
        for output, op in self.edited.ops.items():
            if isinstance(op, (Conv2d, Linear, _Norm)):
                name = self.modules.get(output)
                if name is None:
                    why = "it is computed with tensors of no module"
                else:
                    why = obstacles[name] or (f"it is called {uses[name]} times" if uses[name] > 1 else "")
                if why:
                    whole |= {output: why, op.inputs[0]: f"{name or op.label} reads them, and {why}"}
        self.roots: set[str] = set()
        while True:
            self.look = Channels(self.edited, whole)
            dead = self.look.dead()
            if not self.look.remove(dead):
                break
            self.roots |= {root for root, channels in dead.items() if channels.any()}
        self.tensors = self._cut_tensors(model)

    def _cut_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for output, name in self.modules.items():
            op = self.edited.ops.get(output)
            held = _tensors(model.get_submodule(name))
            made = {} if op is None else self.edited.weights(op)
            if any(made[role].shape[:2] != held[role].shape[:2] for role in made if role in held):
                for role, value in made.items():
                    shape = (*value.shape[:2], *held[role].shape[2:]) if role in held else value.shape
                    found[f"{name}.{role}".lstrip(".")] = value.reshape(shape)
        return found

    def why(self, module: str) -> str:
        """Why a module keeps its channels."""
        output = next((output for output, name in self.modules.items() if name == module), None)
        if output is None or output not in self.edited.ops:
            return "the model's graph does not tell its channels"
        bundles = self.look.bundles
        root = bundles.root(output)
        barred = [name for name in self.look.because if bundles.root(name) == root]
        if barred:
            return f"its channels stay: {self.look.because[output if output in barred else barred[0]]}"
        constant = 0 if output not in bundles.axes else int((~bundles.axes[output].constant.isnan()).sum())
        if constant > 1:
            return f"{constant} of its channels hold a constant, which a border of zeros beside them shows"
        return "none of its channels is dead"


@dataclass(frozen=True, kw_only=True)
class _Norm(Op):
    """A batch norm outside training, with the module's tensors as weights: what torch's operator is in the graph."""

    kind = "norm"
    roles: ClassVar[Roles] = {
        "running_mean": (1, True), "running_var": (1, True), "weight": (1, False), "bias": (1, False)
    }  # fmt: skip

    eps: Number

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return F.batch_norm(x[0], w["running_mean"], w["running_var"], w.get("weight"), w.get("bias"), eps=self.eps)

    def tie_channels(self, bundles: Bundles) -> None:
        axis = bundles.axes.get(self.inputs[0])
        if axis is None or axis.span != 1 or axis.is_map != (len(bundles.shapes[self.output]) > 2):
            super().tie_channels(bundles)
            return
        w = {role: bundles.constants[name] for role, name in self.tensors.items()}
        scale, shift = affine(w["running_mean"], w["running_var"], w.get("weight"), w.get("bias"), self.eps)
        constant = torch.where(scale == 0, shift, axis.constant * scale + shift)
        bundles.tie(self.output, replace(axis, constant=constant.to(axis.constant.dtype)), *self.inputs)


def _as_modules(edited: Editor, model: nn.Module) -> dict[str, str]:
    """What is computed with one module's tensors -> its qualified name; batch norms become operations with weights."""
    found = {}
    for output, op in list(edited.ops.items()):
        if isinstance(op, (Conv2d, Linear)) and op.layer is not None:
            name = op.layer
        elif isinstance(op, TorchOp) and op.op == _NORM and (norm := _norm(edited, op)) is not None:
            edited.replace(op, norm)
            op, name = norm, norm.tensors["running_mean"].removesuffix("running_mean").rstrip(".")
        else:
            continue
        held = {role: x for role, x in _own_tensors(model, name).items() if x.ndim}
        made = edited.weights(op)
        if held.keys() == made.keys() and all(_alike(held[role], made[role]) for role in held):
            found[output] = name
    return found


def _alike(held: Tensor, made: Tensor) -> bool:
    """Whether both are the same rows and columns; the graph gives those of a Conv1d a height."""
    return held.shape[:2] == made.shape[:2] and torch.equal(held.flatten(), made.flatten())


def _norm(edited: Editor, op: TorchOp) -> _Norm | None:
    """A batch norm of the tensors of one module; None where they are computed."""
    roles = ("weight", "bias", "running_mean", "running_var")
    names = {role: x["ref"] for role, x in zip(roles, op.args[1:5], strict=True) if x is not None}
    paths = {name.rpartition(".")[0] if name.rpartition(".")[2] == role else None for role, name in names.items()}
    if len(paths) > 1 or None in paths or any(name not in edited.constants for name in names.values()):
        return None
    return _Norm(op.output, (op.args[0]["ref"],), names, eps=op.args[7])


def _own_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # the layer is a parameter
        return {}
    return {role: x for role, x in _tensors(module).items() if "." not in role}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of its weight, else of its first tensor."""
    held = _own_tensors(module, "")
    return tuple(held.get("weight", next(iter(held.values()), torch.empty(0))).shape)
