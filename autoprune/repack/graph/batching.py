"""Whether a graph computes each sample of a batch alone, so that it may run sample by sample."""

from __future__ import annotations

from autoprune.repack.graph.editor import infer_shapes, unusual
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Scalar
from autoprune.repack.graph.ops.batch_rules import refolded, repeated


def apart(graph: Graph) -> bool:
    """Whether every sample of the outputs depends on the same sample of the inputs alone.

    Decided from what each operation is known to do: False wherever that is not known.
    """
    if not graph.inputs or not all(each.batched and each.free.count(0) == 1 for each in graph.inputs):
        return False
    shapes, batch = infer_shapes(graph), unusual(graph)[0]
    axes: dict[str, int | None] = {each.name: 0 for each in graph.inputs}  # None: the same for every sample
    axes |= dict.fromkeys(graph.constants)
    integers: set[str] = set()  # that depend on the batch's extent
    for op in graph.ops:
        if isinstance(op, Scalar):
            if op.fn != "size":
                integers |= {op.output} if integers & {*op.reads} else set()
            elif axes[op.inputs[0]] in (None, int(op.args[1]) % len(shapes[op.inputs[0]])):
                integers.add(op.output)
            continue
        rule = op.batch_rule()
        told = bool(integers & {*op.reads})  # they may tell the batch's extent
        if told and rule not in (refolded, repeated):
            return False
        axis = shapes[op.output].index(batch) if shapes[op.output].count(batch) == 1 else None
        if any(axes.get(name) is not None for name in op.reads):
            if axis is None or rule is None or not rule(op, axes, shapes, axis):
                return False
        elif told and (axis is None or rule is not repeated):  # of constants alone: the same for every sample, or else
            return False
        axes[op.output] = axis
    return all(axes.get(name) == 0 for name in graph.output_names())
