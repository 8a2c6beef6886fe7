"""Sums, products, copies and concatenations of values wherever they lie, and the kernel behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.repack import ProgramModel, repack
from autoprune.repack.kernels.compiler import narrowed
from autoprune.repack.lowering.steps import TorchStep
from autoprune.repack.outputs import same_output
from autoprune.repack.runtime.program import Program


class Model(nn.Module):
    """A convolution whose output `rest` works on."""

    def __init__(self, rest: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.rest = nn.Conv2d(3, 6, 3, padding=1), rest
        self.after, self.deep = nn.Conv2d(9, 4, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 36, 6))

    def forward(self, x: Tensor) -> Any:
        return self.rest(self, x, self.conv(x))


def squeezed(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return y * y.mean((2, 3), keepdim=True).sigmoid()


def joined(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return cast("Tensor", model.after(torch.cat([x, y], 1)).relu())


def joined_maps(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([y.relu(), model.deep(y).relu()], 1).amax(1, keepdim=True) + torch.cat([y, y], 1)


def tokens(model: Any, x: Tensor, y: Tensor) -> Tensor:
    rows = y.flatten(2).transpose(1, 2)
    return cast("Tensor", torch.cat([model.token.expand(x.shape[0], -1, -1), rows], 1) + model.place)


def shuffled(_: Any, x: Tensor, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


REST: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "squeezed": squeezed,
    "joined": joined,
    "tokens": tokens,
    "shuffled": shuffled,
    "numbers": lambda _, x, y: (2 * x + 1 - x / 3) * 0.5,
    "rows and map": lambda _, x, y: y - x[:, :1],
    "columns": lambda _, x, y: torch.cat([y[..., :1], x.mean(1, keepdim=True)[..., :1].expand(-1, 6, -1, -1)], 3),
    "last axis of one": lambda _, x, y: torch.cat([x.flatten(1)[:, :1], y.flatten(1)[:, :1]], 1),
    "batches": lambda _, x, y: torch.cat([y, y[:0], x.repeat(1, 2, 1, 1)], 0),
    "activation of a view": lambda _, x, y: y.transpose(1, 3).sigmoid(),
    "scalar": lambda model, x, y: y * model.token[0, 0, 0],
}


def program_of(model: nn.Module, x: Tensor) -> ProgramModel:
    fast = repack(model, x, form="program")
    assert isinstance(fast, ProgramModel)
    return fast


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 5, 7, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", REST)
def test_what_works_on_positions_is_native(name: str) -> None:
    model = Model(REST[name]).eval()
    fast = program_of(model, image())
    for batch in (2, 1, 3):
        assert same_output(fast(image(batch)), model(image(batch)), tolerance=1e-5)
    steps = fast.program.plan(((2, 3, 5, 7),)).lowered.steps
    left = {step.op.attributes["op"] for step in steps if isinstance(step, TorchStep)}
    assert left <= {"aten.mean.dim", "aten.repeat.default"}


def test_maps_that_are_joined_stay_maps() -> None:
    model = Model(joined_maps).eval()
    fast = program_of(model, image())
    for batch in (2, 1):
        assert same_output(fast(image(batch)), model(image(batch)), tolerance=1e-5)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", ["squeezed", "tokens", "activation of a view", "joined"])
def test_any_width_of_vectors(name: str, lanes: int) -> None:
    model = Model(REST[name]).eval()
    made = program_of(model, image()).program
    fast = Program(made.graph, made.weights, made.tilings, 1, narrowed(lanes))
    assert same_output(fast(image()), model(image()), tolerance=1e-5)


class Strided(nn.Module):
    """Two operands at strides of all kinds."""

    def __init__(self, order: list[int], steps: list[int], repeated: list[bool], operation: str) -> None:
        super().__init__()
        self.order, self.steps, self.repeated, self.operation = order, steps, repeated, operation

    def seen(self, x: Tensor) -> Tensor:
        for axis, step in enumerate(self.steps):
            x = x[(slice(None),) * axis + (slice(None, None, step),)]
        return x.permute(self.order)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.seen(x)
        for axis, one in enumerate(self.repeated):
            y = y[(slice(None),) * axis + (slice(0, 1) if one else slice(0, x.shape[axis]),)]
        result: Tensor = getattr(torch, self.operation)(x, y)
        return result


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data())
def test_operands_may_lie_at_any_strides(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 5))
    shape = data.draw(st.lists(st.integers(1, 6), min_size=axes, max_size=axes))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    order = data.draw(st.permutations(range(axes)))
    repeated = data.draw(st.lists(st.booleans(), min_size=axes, max_size=axes))
    operation = data.draw(st.sampled_from(["add", "sub", "mul", "div"]))
    x, y = torch.randn(shape), torch.randn([6] * axes) + 3
    model = Strided(order, steps, repeated, operation).eval()
    assert same_output(program_of(model, (x, y))(x, y), model(x, y), tolerance=1e-6)  # type: ignore[arg-type]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.small, self.head = nn.Embedding(40, 19), nn.Embedding(7, 19), nn.Linear(19, 3)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.words(numbers) + self.small(numbers))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_a_table(dtype: torch.dtype) -> None:
    model, numbers = Words().eval(), torch.tensor([[0, 6, 3], [5, 1, 1]], dtype=dtype)
    fast = program_of(model, numbers)
    for batch in (numbers, numbers[:1], numbers[:0], numbers.flip(0).repeat(3, 1)):
        assert same_output(fast(batch), model(batch), tolerance=1e-5)
    steps = fast.program.plan(((2, 3),)).lowered.steps
    assert not any(isinstance(step, TorchStep) for step in steps)


@pytest.mark.parametrize("wrong", [7, -1, 2**40, -(2**63)])
def test_numbers_beyond_a_table_are_refused(wrong: int) -> None:
    fast = program_of(Words().eval(), torch.zeros(1, 3, dtype=torch.int64))
    for batch in (1, 4):
        numbers = torch.zeros(batch, 3, dtype=torch.int64)
        numbers[-1, 1] = wrong
        with pytest.raises(AutopruneError, match=rf"holds {wrong}, but the table .* has rows 0 to 6"):
            fast(numbers)
        assert fast(torch.zeros_like(numbers)).shape == (batch, 3, 3)
