"""What a packed file may ask for: small files that cost much are refused as they are loaded, real models are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import FileError
from autoprune.files import read_tensors, write_tensors
from autoprune.model.weights import weight_of
from autoprune.repack import load, repack, save
from autoprune.repack.graph.demand import LARGEST, MEMORY, PARTS, WORK
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import op_from_json
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.kernels.copy import MOST_PHASES
from autoprune.repack.lowering.pool_rules import WIDEST_POOL
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.runtime.program import Program
from autoprune.repack.weights.packed import pack

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and description of a small program's file."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
    ).eval()
    path = tmp_path_factory.mktemp("saved") / "fast.safetensors"
    save(repack(model, X, form="program", threads=1), path)
    return read_tensors(path, "it")


def op(kind: str, output: str, inputs: list[str], **attributes: Any) -> dict[str, Any]:
    return {"kind": kind, "output": output, "inputs": inputs, "attributes": attributes, "tensors": {}}


def torch_op(name: str, output: str, args: list[Any], inputs: list[str]) -> dict[str, Any]:
    return op("torch", output, inputs, op=name, args=args, kwargs={})


def first(graph: Any, kind: str) -> Any:
    return next(each["attributes"] for each in graph["ops"] if each["kind"] == kind)


def squares(graph: Any) -> None:
    graph["ops"] += [op("scalar", "n0", [], fn="mul", args=[2**31 - 1, 2**31 - 1])]
    graph["ops"] += [op("scalar", f"n{n + 1}", [f"n{n}"], fn="mul", args=[f"n{n}", f"n{n}"]) for n in range(40)]


def doubled(graph: Any) -> None:
    """Each twice as large as the one before."""
    name = graph["outputs"]
    for n in range(30):
        graph["ops"].append(torch_op("aten.cat.default", f"c{n}", [[{"ref": name}, {"ref": name}]], [name]))
        name = f"c{n}"
    graph["outputs"] = name


def added(name: str, args: list[Any], inputs: tuple[str, ...] = ()) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph["ops"].append(torch_op(name, "more", args, list(inputs)))

    return change


def apart(graph: Any) -> None:
    graph["ops"].append(torch_op("aten.zeros.default", "flat", [[2**25]], []))
    graph["ops"].append(torch_op("aten.unbind.int", "part", [{"ref": "flat"}], ["flat"]))
    graph["ops"][-1]["attributes"]["item"] = 0


COSTLY: dict[str, Callable[[Any], Any]] = {
    "padding": lambda graph: first(graph, "conv2d").update(padding=[2**16, 2**16], stride=[2**15, 2**15]),
    "strides": lambda graph: first(graph, "conv2d").update(stride=[2**14, 2**14]),
    "a larger window": lambda graph: first(graph, "max_pool2d").update(
        kernel=[2**15, 2**15], padding=[2**14, 2**14], stride=[2**15, 2**15]
    ),
    "a new tensor": added("aten.zeros.default", [[2**40]]),
    "a new tensor that no torch could make": added("aten.ones.default", [[2**31, 2**31, 2**31]]),
    "doubled": doubled,
    "squares": squares,
    "apart": apart,
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_small_file_that_costs_much_is_refused(saved: Any, tmp_path: Path, name: str) -> None:
    tensors, about = saved[0], copy.deepcopy(saved[1])
    COSTLY[name](about["graph"])
    write_tensors(tmp_path / "fast.safetensors", tensors, about)
    assert (tmp_path / "fast.safetensors").stat().st_size < 40_000
    with pytest.raises(FileError, match=r"fast\.safetensors .*(asks for|computes an integer|apart into|overflowed)"):
        load(tmp_path / "fast.safetensors")


def test_the_limits_are_told(saved: Any, tmp_path: Path) -> None:
    tensors, about = saved[0], copy.deepcopy(saved[1])
    added("aten.zeros.default", [[MEMORY]])(about["graph"])
    write_tensors(tmp_path / "fast.safetensors", tensors, about)
    with pytest.raises(FileError, match=r"asks for 1\.07e\+09 bytes of memory, while a file of \d+ bytes"):
        load(tmp_path / "fast.safetensors")
    assert LARGEST > WORK > PARTS


def test_high_resolution_and_few_weights_are_no_reason(tmp_path: Path) -> None:
    """Super-resolution of a large image by a model of some kilobytes, 90% of it zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2))
    with torch.no_grad():
        for weight in (weight_of(model, "0"), weight_of(model, "2")):
            weight.mul_(torch.rand_like(weight) > 0.9)
    x = torch.randn(1, 1, 480, 640)
    save(repack(model.eval(), x, form="program", threads=1), tmp_path / "fast.safetensors", value_bits=8)
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path / "fast.safetensors", threads=1)(x), model(x), rtol=0.02, atol=0.02)


class Parted(nn.Module):
    """Takes its weight apart."""

    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(8, 6)), how

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.how(self.weight)
        return nn.functional.linear(x, first) * nn.functional.linear(x, second)


PARTS_OF_A_WEIGHT: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda w: w.chunk(2),
    "split": lambda w: w.split(4),
    "unbind": lambda w: w.view(2, 4, 6).unbind(0),
    "meshgrid": lambda w: [each[:4].contiguous() for each in torch.meshgrid(w[:, 0], w[0], indexing="ij")],
}


@pytest.mark.parametrize("name", PARTS_OF_A_WEIGHT)
def test_a_weight_taken_apart_is_loaded(name: str, tmp_path: Path) -> None:
    model, x = Parted(PARTS_OF_A_WEIGHT[name]).eval(), torch.randn(2, 6)
    save(repack(model, x, form="program", threads=1), tmp_path / "fast.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path / "fast.safetensors", threads=1)(x), model(x))


@pytest.mark.parametrize("kind", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("window", [(1, 1, WIDEST_POOL + 1), (2, 1, WIDEST_POOL + 2), (3, 40, 2), (1, 1, 1500)])
def test_a_pooling_of_any_width_is_right(kind: str, window: tuple[int, int, int]) -> None:
    """Rows, dilation and columns: those over a whole sequence took minutes to compile."""
    rows, dilation, columns = window if kind == "max_pool2d" else (window[0], 1, window[2])
    more: dict[str, Any] = {"dilation": [1, dilation]} if kind == "max_pool2d" else {"count_include_pad": False}
    attributes = {"stride": [1, 2], "padding": [0, 1], "kernel": [rows, columns], **more}
    graph = validate(
        Graph((Input("x", (2, 3, 5, 1600), "float32"),), (op_from_json(kind, "y", ("x",), attributes),), "y", {})
    )
    x = torch.randn(2, 3, 5, 1600, generator=torch.Generator().manual_seed(0))
    program = Program(graph, {}, {}, 1)
    torch.testing.assert_close(program(x), reference(graph, (x,)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [(1, MOST_PHASES + 1), (2, 100), (300, 1), (7, 1024)])
def test_a_convolution_of_any_stride_is_right(stride: tuple[int, int]) -> None:
    """Of more phases than code is written for at once, as a spectrogram's."""
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 40)
    attributes = {"stride": list(stride), "padding": [1, 20], "dilation": [1, 1], "groups": 1, "activation": None}
    shape = (2, 3, 40, 1300)
    graph = Graph(
        (Input("x", shape, "float32"),),
        (op_from_json("conv2d", "y", ("x",), attributes, {"weight": "w"}),),
        "y",
        {"w": weight},
    )
    validate(graph)
    x = torch.randn(shape)
    done = Program(graph, {"y": Weights.of(pack(weight), None)}, {}, 1)(x)
    torch.testing.assert_close(done, reference(graph, (x,)), rtol=1e-4, atol=1e-4)


class Apart(nn.Module):
    """Takes tokens apart, of which there are many, by what they hold, which is few."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.linear, self.by = nn.Linear(4, 6), by

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)  # (samples, tokens, 6)
        parts = {
            "unbind": lambda: y.reshape(*x.shape[:2], 3, 2).unbind(2),
            "unbind from the end": lambda: y.reshape(*x.shape[:2], 3, 2).unbind(-2),
            "split": lambda: y.split(2, 2),
            "sizes": lambda: y.split([2, 2, 2], -1),
        }[self.by]()
        first, second, third = parts
        made: Tensor = torch.sigmoid(first) * second + third
        return made


@pytest.mark.parametrize("by", ["unbind", "unbind from the end", "split", "sizes"])
def test_many_tokens_are_taken_apart_into_few(by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Apart(by).eval(), torch.randn(1, PARTS + 5, 4)
    fast = repack(model, x, form="program", threads=1)
    save(fast, tmp_path / "fast.safetensors")
    assert torch.equal(load(tmp_path / "fast.safetensors")(x), fast(x))
