"""Writing a module as an ONNX file with packed weights, and timing small modules in an engine that reads one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from autoprune.files import temporary_folder
from autoprune.latency.engines.base import Call
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.timer import Clock, Protocol, measure_together
from autoprune.repack.graph import torch_export as exporting
from autoprune.repack.graph.capture import CaptureError
from autoprune.repack.graph.freedom import Extents
from autoprune.repack.modules.backends.portable import by_group
from autoprune.repack.onnx.rewrites import rewritten
from autoprune.repack.weights.packed import pack
from autoprune.tracing import tracing

PACKED = 0.75  # a weight is stored packed where that takes at most this share of its bytes
ONE_FILE = 2**31 - 2**24  # bytes of weights: protobuf ends at 2 GiB
CASES = 8  # layers in one file that is written to time them


def write_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    batched: Sequence[bool],
    path: Path,
    names: Sequence[str] | None = None,
) -> bool:
    """Writes one file, or the weights beside it in ``<name>.data`` where they need more than 2 GiB.

    Args:
        module: in eval mode.
        inputs: examples.
        batched: those whose first extent may be any in the file; for none where the exporter cannot do that.
        path: overwritten.
        names: of the inputs in the file; torch's own when None.

    Returns:
        Whether the file takes any batch size.

    Raises:
        AutopruneError: torch cannot export the module.
    """
    for each in [batched, [False] * len(inputs)] if any(batched) else [batched]:
        try:
            program = _exported(module, inputs, each, names)
            break
        except CaptureError as error:
            failed = error
    else:
        raise failed
    graph = program.model.graph
    for name in list(graph.initializers):
        _pack_initializer(graph, name)
    size = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=size > ONE_FILE)
    return any(each)


def _exported(
    module: nn.Module, inputs: tuple[Tensor, ...], batched: Sequence[bool], names: Sequence[str] | None = None
) -> torch.onnx.ONNXProgram:
    free = [(0,) if each else () for each in batched]
    one = {(number, 0): 2 for number, x in enumerate(inputs) if batched[number] and x.shape[0] < 2}
    program = exporting.export(module, inputs, free, one)
    known = Extents(exporting.user_inputs(program))
    pinned = {None, *known.pinned()}
    if any(each and own.get(0) in pinned for each, own in zip(batched, known.axes, strict=True)):
        raise CaptureError("torch.export fixes the first extent of an input.")
    shapes = exporting.dynamic_shapes(module, free, Dim("batch"))  # gives the extents their name
    try:
        with tracing():
            program = rewritten(program)
            with torch.inference_mode():
                made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names, dynamic_shapes=shapes)
    except Exception as error:  # the exporter raises whatever its translations raise
        told = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptureError(f"the model cannot be exported to ONNX: {told}.") from error
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.clear()  # stack traces
    return made


def _pack_initializer(graph: Any, name: str) -> None:
    """Stores a weight with many zeros packed, in front of operators that unpack it: engines fold them at load time.

    Done after the exporter's own folding, which would unpack small weights again.
    """
    import onnx_ir as ir

    held = graph.initializers[name]
    weight = held.const_value.numpy()
    if weight.dtype != np.float32 or weight.ndim < 2 or np.count_nonzero(weight) > PACKED * weight.size:
        return
    ways = [weight, weight.T] if weight.ndim == 2 else [weight]  # the exporter turns some Linears' weights round
    packed = [[x.numpy() for x in by_group(pack(torch.from_numpy(way.copy())))] for way in ways]
    sizes = [sum(x.nbytes for x in arrays) for arrays in packed]
    best = int(np.argmin(sizes))
    if sizes[best] > PACKED * weight.nbytes:
        return
    (positions, values, order), shape = packed[best], ways[best].shape
    groups, size, _ = values.shape

    def constant(role: str, array: NDArray[Any]) -> Any:
        made = ir.Value(name=f"{name}.{role}", const_value=ir.tensor(array))
        graph.register_initializer(made)
        return made

    def extents(role: str, *shape: int) -> Any:
        return constant(role, np.array(shape, np.int64))

    kept = constant("values", values)
    empty = ir.node("ConstantOfShape", [extents("empty", groups, size, weight.size // shape[0])])
    where = ir.node("Expand", [constant("positions", positions[:, None]), extents("kept", *values.shape)])
    filled = ir.node("ScatterElements", [empty.outputs[0], where.outputs[0], kept], {"axis": 2})
    rows = ir.node("Reshape", [filled.outputs[0], extents("rows", groups * size, -1)])
    ordered = ir.node("Gather", [rows.outputs[0], constant("order", order)], {"axis": 0})
    nodes = [empty, where, filled, rows, ordered, ir.node("Reshape", [ordered.outputs[0], extents("shape", *shape)])]
    if best == 1:
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0]}))
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(held, nodes[-1].outputs[0])
    del graph.initializers[name]


@dataclass(frozen=True)
class Case:
    """Modules that compute the same of one input, by name."""

    x: Tensor
    forms: Mapping[str, nn.Module]


class _Cases(nn.Module):
    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(nn.ModuleList(case.forms.values()) for case in cases)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [form(x) for x, forms in zip(inputs, self.forms, strict=True) for form in forms]  # type: ignore[attr-defined]


def time_cases(
    cases: Sequence[Case], engine: OnnxEngine, threads: int, protocol: Protocol, clock: Clock
) -> list[dict[str, float]]:
    """Microseconds a call of every form in an engine, those of a case in turns.

    The exporter takes a second to start and a moment a module, so several cases are written as one file and cut out.
    """
    times: list[dict[str, float]] = []
    for first in range(0, len(cases), CASES):
        for calls in _calls(cases[first : first + CASES], engine, threads):
            found = measure_together(calls, protocol, clock)
            times.append({name: latency.median_ms * 1e3 for name, latency in found.items()})
    return times


def _calls(cases: Sequence[Case], engine: OnnxEngine, threads: int) -> list[dict[str, Callable[[], object]]]:
    import onnx
    from onnx.utils import Extractor

    whole = _exported(_Cases(cases).eval(), tuple(case.x for case in cases), [False] * len(cases)).model_proto
    cut, outputs = Extractor(whole), iter(whole.graph.output)
    calls = []
    with temporary_folder() as folder:
        path = folder / "layer.onnx"
        for case, given in zip(cases, whole.graph.input, strict=True):
            loaded: dict[str, Call] = {}
            for name in case.forms:
                onnx.save(cut.extract_model([given.name], [next(outputs).name]), str(path))
                loaded[name] = engine.load(path, (case.x,), threads)
                path.unlink()
            calls.append(loaded)
    return calls
