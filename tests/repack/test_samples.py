"""Which graphs keep the samples of a batch apart, and programs that compute a batch sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.repack import Graph, ProgramModel, capture, load, repack, save
from autoprune.repack.graph.batching import apart
from autoprune.repack.graph.ir import Input
from autoprune.repack.graph.ops import Op, op_from_json
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.schema import validate
from autoprune.repack.lowering.per_sample import NAME
from autoprune.repack.outputs import same_output
from autoprune.repack.runtime.program import Plan, Program
from autoprune.repack.tuning.tuning import TuningCache, faster_by_sample, tune
from autoprune.testing import FakeClock


class Model(nn.Module):
    def __init__(self, rest: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.deep, self.head = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Linear(8, 5)
        self.qkv, self.layer_norm = nn.Linear(8, 24), nn.LayerNorm(8)
        self.token, self.three = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(3, 1, 1, 1))
        self.rest = rest

    def forward(self, x: Tensor) -> Any:
        return self.rest(self, self.norm(self.conv(x)).relu())


def attended(model: Any, y: Tensor) -> Tensor:
    batch = y.shape[0]
    tokens = torch.cat([model.token.expand(batch, -1, -1), y.flatten(2).transpose(1, 2)], 1)
    count = tokens.shape[1]
    q, k, v = model.qkv(model.layer_norm(tokens)).reshape(batch, count, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, 8)
    return model.head((mixed + tokens)[:, 0])  # type: ignore[no-any-return]


APART: dict[str, Callable[[Any, Tensor], Any]] = {
    "network": lambda model, y: model.head(model.pool(model.deep(y) + 1).mean((2, 3))),
    "attention": attended,
    "two outputs": lambda model, y: {"map": model.pool(y), "rows": model.head(y.mean((2, 3)))},
    "squeezed": lambda model, y: y * y.mean((2, 3), keepdim=True).sigmoid(),
    "softmax": lambda model, y: model.head(y.mean((2, 3))).softmax(-1),
    "halves": lambda model, y: torch.cat([y[:, 4:], y[:, :4]], 1),
}
TOGETHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean of the batch": lambda model, y: y - y.mean(0, keepdim=True),
    "largest of all": lambda model, y: y / y.amax(),
    "softmax over the batch": lambda model, y: model.head(y.mean((2, 3))).softmax(0),
    "the first sample": lambda model, y: y - y[:1],
    "running sum": lambda model, y: y.cumsum(0),
    "turned": lambda model, y: y.flip(0),
    "batch in the values": lambda model, y: y / y.shape[0],
    "folded": lambda model, y: y.flatten(0, 1).reshape(-1, 4, 9, 12),
    "batch second": lambda model, y: model.head(y.mean((2, 3))).transpose(0, 1),
    "products": lambda model, y: y.flatten(1) @ y.flatten(1).transpose(0, 1),
    "how many": lambda model, y: (y, y.shape[0]),
    "joined": lambda model, y: torch.cat([y, y], 0),
}


def image(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 9, 12, generator=torch.Generator().manual_seed(seed))


def program_of(model: nn.Module, x: Tensor, **more: Any) -> ProgramModel:
    fast = repack(model, x, form="program", **more)
    assert isinstance(fast, ProgramModel)
    return fast


def sample_by_sample(fast: ProgramModel, threads: int | None = 1) -> Program:
    made = fast.program
    return Program(made.graph, made.weights, made.tilings, threads, made.target, by_sample=True)


def splits(program: Program, batch: int) -> bool:
    plan = program.chosen_plan(((batch, 3, 9, 12),))
    assert isinstance(plan, Plan)
    part = plan.parts[0]
    return [op.name for op in getattr(part, "ops", ())] == [NAME]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", APART)
def test_graphs_that_keep_samples_apart(name: str) -> None:
    assert apart(simplify(capture(Model(APART[name]).eval(), (image(),))))


@pytest.mark.parametrize("name", TOGETHER)
def test_graphs_that_do_not(name: str) -> None:
    model = Model(TOGETHER[name]).eval()
    assert not apart(simplify(capture(model, (image(),))))
    fast = program_of(model, image())
    assert not fast.program.by_sample
    assert same_output(fast(image(3)), model(image(3)))


@pytest.mark.parametrize(("again", "alone"), [("aten.transpose.int", True), ("aten.reshape.default", False)])
def test_constants_that_are_repeated(again: str, alone: bool) -> None:
    """Repeated for every sample a column is the same for all; refolded it is not."""
    size, x, wide = {"ref": "size"}, {"ref": "x"}, {"ref": "wide"}
    rest = [0, 1] if alone else [[size, 4]]

    def torch_op(name: str, output: str, reads: tuple[str, ...], args: list[Any]) -> Op:
        return op_from_json("torch", output, reads, {"op": name, "args": args, "kwargs": {}})

    graph = Graph(
        (Input("x", (2, 4), "float32", (0, None)),),
        (
            op_from_json("scalar", "size", ("x",), {"fn": "size", "args": ["x", 0]}),
            torch_op("aten.expand.default", "wide", ("column", "size"), [{"ref": "column"}, [4, size]]),
            torch_op(again, "rows", ("wide",) if alone else ("wide", "size"), [wide, *rest]),
            torch_op("aten.mul.Tensor", "y", ("x", "rows"), [x, {"ref": "rows"}]),
        ),
        "y",
        {"column": torch.randn(4, 1)},
    )
    assert apart(validate(graph)) == alone


def test_a_batch_of_one_size_is_not_taken_apart() -> None:
    model = Model(lambda model, y: y + model.three).eval()
    assert not apart(simplify(capture(model, (image(3),))))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["network", "attention", "two outputs", "squeezed", "halves"])
def test_a_batch_sample_by_sample_is_the_same(name: str, threads: int) -> None:
    model = Model(APART[name]).eval()
    program = sample_by_sample(program_of(model, image(1)), threads)
    for batch in (1, 2, 3, 6, 13):
        x = image(batch, batch)
        for _ in range(2):
            assert same_output(program(x), model(x), tolerance=1e-5)
    assert splits(program, 6)
    assert splits(program, 13) or threads > 1
    assert not splits(program, 1)


def test_threads_may_change_between_calls() -> None:
    model = Model(APART["network"]).eval()
    program, before = sample_by_sample(program_of(model, image(1)), None), torch.get_num_threads()
    try:
        for threads in (1, 3, 2, 1):
            torch.set_num_threads(threads)
            assert same_output(program(image(6)), model(image(6)), tolerance=1e-5)
    finally:
        torch.set_num_threads(before)


def test_what_torch_computes_stays_in_one_piece() -> None:
    model = Model(lambda model, y: model.head(y.mean((2, 3)).atan())).eval()
    fast = program_of(model, image(1))
    assert apart(fast.program.graph)
    program = sample_by_sample(fast)
    assert not splits(program, 4)
    assert same_output(program(image(4)), model(image(4)), tolerance=1e-5)


@pytest.mark.parametrize("by_sample", [True, False])
def test_files_remember_how_a_batch_is_computed(by_sample: bool, tmp_path: Path) -> None:
    model, x = Model(APART["network"]).eval(), image(4)
    fast = program_of(model, x)
    fast.program.by_sample = by_sample
    save(fast, tmp_path / "model.safetensors")
    read = load(tmp_path / "model.safetensors", threads=1)
    assert isinstance(read, ProgramModel)
    assert read.program.by_sample == by_sample
    assert splits(read.program, 4) == by_sample
    assert same_output(read(x), model(x), tolerance=1e-5)


def test_the_faster_way_is_measured_once(tmp_path: Path) -> None:
    model, cache, clock = Model(APART["network"]).eval(), TuningCache(tmp_path / "tuning.json"), FakeClock(0.0)
    program = program_of(model, image(4), cache=cache).program
    tuned = tune(program, {}, (image(4),), cache)

    def takes(seconds: float) -> Program:
        class Slow(Program):
            def __call__(self, *inputs: Tensor) -> Any:
                clock.now_s += seconds
                return super().__call__(*inputs)

        return Slow(program.graph, program.weights, program.tilings, 1)

    for batch, (whole, apart_, faster) in enumerate([(2.0, 1.0, True), (2.0, 3.0, False)], 4):
        given = (image(batch),)
        assert faster_by_sample(takes(whole), takes(apart_), (tuned, tuned), given, cache, clock) is faster
        again = TuningCache(cache.path)
        assert faster_by_sample(takes(apart_), takes(whole), (tuned, tuned), given, again, clock) is faster


def test_weights_read_for_few_operations_are_read_once_a_batch() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(280, 500)).eval()
    assert not program_of(wide, image(1)).program.by_sample
    narrow = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(2), nn.Flatten()).eval()
    assert program_of(narrow, image(1)).program.by_sample
