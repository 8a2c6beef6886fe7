"""Asking torch.export for a model's operators, quietly, and for a form of them in which nothing is written in place."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from autoprune.errors import AutopruneError, first_line
from autoprune.model.copies import own_copy
from autoprune.repack.graph.light_norms import light_norms
from autoprune.tracing import ByThread, replaced, tracing

_aten = torch.ops.aten
# Operators that write in place -> what they compute.
IN_PLACE: Mapping[Any, torch._ops.OpOverload] = {
    _aten.relu_.default: _aten.relu.default,
    _aten.relu6_.default: _aten.relu6.default,
    _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.silu_.default: _aten.silu.default,
    _aten.sigmoid_.default: _aten.sigmoid.default,
    _aten.tanh_.default: _aten.tanh.default,
    _aten.hardswish_.default: _aten.hardswish.default,
    _aten.hardsigmoid_.default: _aten.hardsigmoid.default,
    _aten.leaky_relu_.default: _aten.leaky_relu.default,
    _aten.elu_.default: _aten.elu.default,
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.sub_.Tensor: _aten.sub.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.div_.Tensor: _aten.div.Tensor,
    _aten.dropout_.default: _aten.dropout.default,
    _aten.feature_dropout_.default: _aten.feature_dropout.default,
    _aten.alpha_dropout_.default: _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout_.default: _aten.feature_alpha_dropout.default,
    _aten.detach_.default: _aten.detach.default,
}
# Of these, what gives its input back as it is: a dropout that draws numbers is in no program.
_IDLE = {
    *(_aten.dropout_.default, _aten.feature_dropout_.default, _aten.alpha_dropout_.default),
    *(_aten.feature_alpha_dropout_.default, _aten.detach_.default),
}
# Operators whose result shares memory with their first argument, if with any tensor.
_VIEWS = {
    *_IDLE,
    *(IN_PLACE[each] for each in _IDLE),
    *(_aten.alias.default, _aten.slice.Tensor, _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints),
    *(_aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim),
}
# Operators whose result never shares memory with another tensor.
_FRESH = {
    *(_aten.conv2d.default, _aten.conv2d.padding, _aten.batch_norm.default, _aten.linear.default, _aten.matmul.default),
    *(_aten.layer_norm.default, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor),
    *(_aten.max_pool2d.default, _aten.avg_pool2d.default, _aten.cat.default),
}


Axes = Sequence[int]
INTRICATE = 256
"""Parts that an expression of free extents may have. Where maps are padded to whole windows stage after stage, each
stage's expressions are twice as large as those of the one before, and torch takes minutes over them."""


class CaptureError(AutopruneError):
    """A model that cannot be captured as a graph; it can still be repacked a layer at a time."""


class IntricateExtents(CaptureError):
    """Extents that cannot be free in good time: see `INTRICATE`."""


def export(
    model: nn.Module, inputs: Sequence[Tensor], free: Sequence[Axes], grown: Mapping[tuple[int, int], int]
) -> ExportedProgram:
    """Asks for a form of the model in which extents are as free as the model leaves them.

    Args:
        model: in eval mode.
        inputs: examples.
        free: of each input, the axes whose extents may become free; which do, and which are one, torch finds out.
        grown: input and axis -> the extent that it is captured at, where the example's is one that torch takes for a
            constant, as it does 0 and 1.

    Raises:
        IntricateExtents: the model computes more from free extents than can be followed in good time.
        CaptureError: torch cannot export it.
    """
    # Torch takes tensors that are one object for one input, and so would what it exports.
    examples = [own_copy(x) for x in inputs]
    for (number, axis), extent in grown.items():
        examples[number] = _of_extent(examples[number], axis, extent)
    try:
        shapes = dynamic_shapes(model, free, Dim.AUTO)
        with tracing(), _plain_attention(), _simple_extents(), light_norms(), torch.no_grad():
            exported: ExportedProgram = torch.export.export(model, tuple(examples), dynamic_shapes=shapes, strict=False)
            return exported
    except IntricateExtents:
        raise
    except Exception as error:  # the model is the user's, and export raises whatever it likes
        raise _failed(error) from error


@contextmanager
def _simple_extents() -> Iterator[None]:
    """Ends an export of this thread that asks for the value of an intricate expression."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # here: torch's compiler takes long to load

    own, thread, simple, intricate = ShapeEnv.evaluate_expr, threading.get_ident(), set[Any](), []

    @wraps(own)
    def evaluate(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and expression not in simple:
            if _is_intricate(expression):
                intricate.append(expression)
                raise IntricateExtents("sizes within the model are too intricate functions of its inputs' extents.")
            simple.add(expression)
        return own(self, expression, *args, **kwargs)

    try:
        with replaced(ShapeEnv, "evaluate_expr", evaluate):
            yield
    except Exception as error:  # torch may have made another error of it
        if intricate and not isinstance(error, IntricateExtents):
            raise IntricateExtents(f"{first_line(error)[:300]}") from error
        raise


def _is_intricate(expression: Any) -> bool:
    waiting, parts = [expression], 0
    while waiting and parts <= INTRICATE:
        waiting.extend(getattr(waiting.pop(), "args", ()))
        parts += 1
    return parts > INTRICATE


def _of_extent(x: Tensor, axis: int, extent: int) -> Tensor:
    """What lies along an axis, again from the beginning where it ends; zeros where there is nothing."""
    if not x.shape[axis]:
        return x.new_zeros((*x.shape[:axis], extent, *x.shape[axis + 1 :]))
    return x.index_select(axis, torch.arange(extent, device=x.device) % x.shape[axis])


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The nodes that stand for the inputs, in order."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in names]


def dynamic_shapes(model: nn.Module, free: Sequence[Axes], extent: Any) -> tuple[Any, ...] | None:
    """Which axes are `extent`, nested as the arguments of `forward`: what ``*args`` takes is a tuple of its own."""
    axes = [dict.fromkeys(each, extent) for each in free]
    extents = [each or None for each in axes]
    given = inspect.signature(model.forward).bind(*extents).arguments
    return tuple(given.values()) if any(axes) else None


def _failed(error: Exception) -> CaptureError:
    return CaptureError(f"torch.export cannot capture the model ({type(error).__name__}: {first_line(error)[:300]}).")


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program with every in-place operator made functional; takes longer than exporting it."""
    try:
        with tracing(), _keeping_whole(program.graph), torch.no_grad():
            written: ExportedProgram = program.run_decompositions({})  # no operator is taken apart
            return written
    except Exception as error:  # as above
        raise _failed(error) from error


@contextmanager
def _keeping_whole(graph: fx.Graph) -> Iterator[None]:
    """While a graph is decomposed its composite operators stay whole; by itself torch prepares all there are."""
    import torch.export.exported_program as decomposing  # here: torch's compiler takes long to load

    name, standing = "_collect_all_valid_cia_ops", {node.target for node in graph.nodes}
    every = getattr(decomposing, name)
    with replaced(decomposing, name, lambda: standing & every()):
        yield


def is_functional(graph: fx.Graph) -> bool:
    """Whether what is written in place, if anything, is a fresh tensor that nothing else sees."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is torch.ops.aten.batch_norm.default and node.args[5]:
            return False  # it updates its statistics, which its schema does not say
        writes = node.target._schema.is_mutable and node.target not in _IDLE
        if writes and not (node.target in IN_PLACE and _seen_once(node.args[0])):
            return False
    return True


def _seen_once(x: Any) -> bool:
    """Whether `x` is, or is a view of, a fresh tensor, and nothing but its one user sees that."""
    while isinstance(x, fx.Node) and len(x.users) == 1:
        if x.target not in _VIEWS:
            return x.target in _FRESH or x.target in IN_PLACE
        x = x.args[0]
    return False


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keeps torch's modules from calling one fused operator that hides their Linear layers."""
    before = bool(torch.backends.mha.get_fastpath_enabled())
    flag: Any = ByThread(False, lambda: before)
    torch.backends.mha.set_fastpath_enabled(flag)
    try:
        yield
    finally:
        flag.end()
        if torch.backends.mha.get_fastpath_enabled() is flag:  # nobody else has set it
            torch.backends.mha.set_fastpath_enabled(before)
