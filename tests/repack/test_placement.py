"""What holds of the grids in any graph, whichever of its layers are int8."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import (
    Add,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Op,
    Quantize,
    Reshape,
    TorchOp,
)
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.quantize import Settings, quantisable, quantised_graph

SIDE, ONE, THREE = 8, (1, 1), (3, 3)


def random_graph(rng: random.Random) -> Graph:
    """Convolutions, some with residuals, pools, sums, concatenations and what has no form in bytes, then a Linear."""
    constants, ops = dict[str, Tensor](), list[Op]()
    channels = {"x": 4}  # of each map

    def weights(name: str, *shape: int) -> dict[str, str]:
        constants[f"{name}.w"], constants[f"{name}.b"] = torch.randn(shape) / 4, torch.randn(shape[0])
        return {"weight": f"{name}.w", "bias": f"{name}.b"}

    def made(name: str, kind: str, x: str) -> Op:
        width = channels[name] = channels[x]
        alike = [other for other, own in channels.items() if own == width and other not in (x, name)]
        if kind in ("conv", "depthwise"):
            groups = width if kind == "depthwise" else 1
            filters = channels[name] = width if groups > 1 else rng.choice([4, 8])
            residuals = [other for other, own in channels.items() if own == filters and other not in (x, name)]
            inputs = (x, rng.choice(residuals)) if residuals and rng.random() < 0.4 else (x,)
            activation = rng.choice(["relu", "silu", None])
            tensors = weights(name, filters, width // groups, 3, 3)
            return Conv2d(
                name, inputs, tensors, stride=ONE, padding=ONE, dilation=ONE, groups=groups, activation=activation
            )  # fmt: skip
        if kind == "max":
            return MaxPool2d(name, (x,), kernel=THREE, stride=ONE, padding=ONE, dilation=ONE)
        if kind == "mean":
            counted = rng.random() < 0.5
            return AvgPool2d(name, (x,), kernel=THREE, stride=ONE, padding=ONE, count_include_pad=counted)
        if kind == "add" and alike:
            return Add(name, (x, rng.choice(alike)), activation=rng.choice(["relu", None]))
        if kind == "cat":
            other = rng.choice([each for each in channels if each != name])
            channels[name] = width + channels[other]
            return TorchOp.of(name, "aten.cat.default", ([{"ref": x}, {"ref": other}], 1))
        return TorchOp.of(name, "aten.sin.default", ({"ref": x},))

    for number in range(rng.randint(3, 10)):
        kind = rng.choice(["conv", "conv", "conv", "depthwise", "max", "mean", "add", "cat", "sin"])
        ops.append(made(f"v{number}", kind, rng.choice([*channels][-4:])))
    last, outputs = ops[-1].output, rng.sample([op.output for op in ops], rng.randint(0, 1))
    if rng.random() < 0.5:
        ops.append(GlobalAvgPool("flat", (last,), keepdim=False))
        features = channels[last]
    else:
        ops.append(Reshape("flat", (last,), shape=(-1, channels[last] * SIDE**2)))
        features = channels[last] * SIDE**2
    ops.append(Linear("end", ("flat",), weights("end", 5, features), activation=None))
    x = Input("x", (2, 4, SIDE, SIDE), "float32", (0,))
    return validate(Graph((x,), tuple(ops), {"list": [*outputs, "end"]}, constants))


@pytest.mark.parametrize("seed", range(40))
def test_int8_layers_read_bytes_and_nobody_reads_bytes_who_cannot(seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    graph = random_graph(rng)
    layers = {name for name in quantisable(graph) if rng.random() < 0.8}
    batches = [(torch.randn(3, 4, SIDE, SIDE),) for _ in range(2)]
    found = quantised_graph(graph, layers, batches, Settings("min_max", bias_correction=False))

    quantized = {op.output: op for op in found.graph.ops if isinstance(op, Quantize)}
    assert len({op.inputs for op in quantized.values()}) == len(quantized)
    assert not quantized.keys() & set(found.graph.output_names())
    names = [op.output for op in found.graph.ops]
    flat = Graph(found.graph.inputs, found.graph.ops, {"list": names}, found.graph.constants)
    values = {"x": batches[0][0], **dict(zip(names, reference(flat, batches[0]), strict=True))}
    grids = {name: op.grid for name, op in quantized.items()}
    for op in found.graph.ops:
        if isinstance(op, (MaxPool2d, Reshape)) and op.inputs[0] in grids:
            grids[op.output] = grids[op.inputs[0]]
        read = [name for name in op.inputs if name in grids]
        if op.output in layers:
            assert op.inputs[0] in grids
        elif read and not isinstance(op, (MaxPool2d, Reshape, AvgPool2d, GlobalAvgPool, Add)):
            assert isinstance(op, TorchOp)
            assert op.op == "aten.cat.default"
    for name, grid in grids.items():
        assert torch.equal(grid.rounded(values[name]), values[name])
    for name in found.graph.output_names():
        assert name not in grids
