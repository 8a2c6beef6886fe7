"""A program bound to tensors computes what it computes unbound, whatever is written to them, and stays safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.errors import AutopruneError
from autoprune.repack import ProgramModel, repack


class Step(nn.Module):
    """A step of an LSTM with its states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 16)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.rnn(x, (h, c))
        return y, h, c


class Words(nn.Module):
    """Numbers that are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.table(x)))


class Rolled(nn.Module):
    """An operation of torch between native ones, and several kinds of output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.roll(self.conv(x).relu(), 1, 2)
        return {"y": self.head(y.mean((2, 3))), "all": [y, y[:, 0]]}


def given(model: nn.Module, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Words):
        return (torch.randint(10, (2, 4), generator=generator),)
    shapes = [(2, 3, 6, 6)] if isinstance(model, Rolled) else [(1, 2, 12), (1, 2, 16), (1, 2, 16)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.fixture(params=[Step, Words, Rolled])
def packed(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Callable[[int], ProgramModel]]]:
    torch.manual_seed(0)
    model = request.param().eval()

    def made(threads: int) -> ProgramModel:
        fast = repack(model, given(model, 0), threads=threads, form="program")
        assert isinstance(fast, ProgramModel)
        return fast

    with torch.no_grad():
        yield model, made


def assert_equal(got: Any, wanted: Any) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_it_computes_what_its_tensors_hold(packed: Any, threads: int) -> None:
    model, made = packed
    fast = made(threads)
    first = given(model, 1)
    kept = [x.clone() for x in first]
    bound = fast.bind(*first)
    for seed in (1, 2, 3, 1):
        inputs = given(model, seed)
        for place, x in zip(bound.inputs, inputs, strict=True):
            place.copy_(x)
        assert_equal(bound(), fast(*inputs))
    assert_equal(first, kept)


def test_what_a_call_returned_may_be_overwritten_and_fed_back() -> None:
    torch.manual_seed(0)
    model = Step().eval()
    inputs = given(model, 0)
    with torch.no_grad():
        fast = repack(model, inputs, threads=1, form="program")
        assert isinstance(fast, ProgramModel)
        bound, (x, h, c) = fast.bind(*inputs), inputs
        for seed in range(4):
            bound.inputs[0].copy_(x)
            _, h, c = fast(x, h, c)
            results = bound()
            assert_equal(results[1:], (h, c))
            for place, state in zip(bound.inputs[1:], results[1:], strict=True):
                place.copy_(state)
            x = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(seed))
        assert bound()[0].data_ptr() == results[0].data_ptr()


def test_bound_in_inference_mode_it_is_written_to_outside_of_it() -> None:
    model = Words().eval()
    with torch.inference_mode():
        fast = repack(model, given(model, 0), form="program")
        assert isinstance(fast, ProgramModel)
        bound = fast.bind(*given(model, 0))
    bound.inputs[0].copy_(given(model, 1)[0])
    torch.testing.assert_close(bound(), model(given(model, 1)[0]).detach())


def test_threads_take_turns(packed: Any) -> None:
    model, made = packed
    fast = made(2)
    bound = fast.bind(*given(model, 1))
    wanted = fast(*given(model, 1))
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: bound(), range(200)):
            assert_equal(results, wanted)


def test_what_native_code_must_not_meet_is_an_error(packed: Any) -> None:
    model, made = packed
    fast = made(1)
    with pytest.raises(AutopruneError, match="a program takes"):
        fast.bind(*(x.double() for x in given(model, 0)))
    bound = fast.bind(*given(model, 0))
    if isinstance(model, Words):
        bound.inputs[0][1, 2] = 10
        with pytest.raises(AutopruneError, match="holds 10, but the table"):
            bound()
        bound.inputs[0][1, 2] = 9
    bound()
    bound.inputs[0].resize_(4096)
    with pytest.raises(AutopruneError, match="other memory now"):
        bound()
    again = fast.bind(*given(model, 0))
    tree_leaves(again())[-1].untyped_storage().resize_(0)
    if not isinstance(model, Rolled):  # there torch makes new results every time
        with pytest.raises(AutopruneError, match="other memory now"):
            again()
