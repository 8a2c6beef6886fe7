"""Integers, booleans and what is looked up by them, moved or reduced: native, and equal to torch, for any entries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.repack.runtime.program import Program
from tests.repack.test_kernels import assert_stays_inside
from tests.repack.test_native_ops import Run, data, simplified, torch_steps
from tests.repack.test_token_kernels import target_of

LONGS, INTS = torch.int64, torch.int32


def whole(*shape: int, dtype: torch.dtype = LONGS, low: int = -9, high: int = 9) -> Tensor:
    """Integers, or with a `dtype` of booleans those that are odd."""
    made = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made % 2 == 1 if dtype == torch.bool else made.to(dtype)


def bools(*shape: int) -> Tensor:
    return whole(*shape, dtype=torch.bool)


def numbers(limit: int, *shape: int, dtype: torch.dtype = LONGS) -> Tensor:
    return whole(*shape, low=0, high=limit, dtype=dtype)


def assert_same(run: Run, *inputs: Tensor, lanes: int = 16, walled: bool = True) -> None:
    """Native, and equal to torch: bit for bit but for floats; in walled memory."""
    graph, target = simplified(run, *inputs), target_of(lanes)
    assert torch_steps(graph, *inputs, target=target) == []
    program = Program(graph, {}, threads=1, target=target)
    got, wanted = program(*inputs), run(*inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 if wanted.is_floating_point() else 0, equal_nan=True)
    if walled:
        assert_stays_inside(program, list(inputs))


def widths(cases: Iterable[str]) -> list[tuple[str, int]]:
    """Each case with one width of vectors, in turns: to compile takes longer than to run."""
    return [*zip(cases, itertools.cycle((4, 16)), strict=False)]


Case = tuple[Run, Callable[[], tuple[Tensor, ...]]]
ELEMENTS: dict[str, Case] = {
    "mask of padding": (lambda m: m.bool(), lambda: (whole(2, 37),)),
    "booleans as floats": (lambda m: m.float() * 2, lambda: (bools(2, 37),)),
    "booleans as integers": (lambda m: m.long() + m.int(), lambda: (bools(2, 37),)),
    "the type of another": (lambda m, x: m.type_as(x) + x.type_as(m), lambda: (whole(3, 41), data(3, 41))),
    "floats as integers": (lambda x: (x * 9).long() + (x * 9).int(), lambda: (data(3, 41),)),
    "floats as booleans": (lambda x: x.relu().bool(), lambda: (data(3, 41),)),
    "integers as floats": (lambda n: n.float() / 3, lambda: (whole(3, 41),)),
    "bytes as floats": (lambda n: n.float() / 255, lambda: (numbers(256, 2, 41, dtype=torch.uint8),)),
    "shorter and longer integers": (lambda n: n.int().long() * 2, lambda: (whole(3, 41),)),
    "and, or, xor, not": (lambda m, n: (m & n) | (m ^ ~n), lambda: (bools(2, 1, 37), bools(5, 37))),
    "logical": (lambda m, n: m.logical_and(n) | m.logical_or(n).logical_xor(n.logical_not()),
                lambda: (whole(2, 37), bools(2, 37))),
    "bits": (lambda n, m: (n & m) | (n ^ 5) & ~m, lambda: (whole(2, 37), whole(2, 37))),
    "sums and products": (lambda n, m: (n + m) * 3 - m * n, lambda: (whole(5, 1, 37), whole(4, 37))),
    "of both lengths": (lambda n, m: n * m + 1, lambda: (whole(5, 37, dtype=INTS), whole(5, 37))),
    "integers and floats": (lambda n, x: n * x - n / 4, lambda: (whole(5, 37), data(5, 37))),
    "rounded down": (lambda n: (n // 4) * 100 + n % 4, lambda: (whole(3, 41),)),
    "order of integers": (lambda n, m: (n < m) | (n >= 4) & (m != n), lambda: (whole(2, 37), whole(2, 37))),
    "order of floats": (lambda x, y: (x <= y) ^ (x > 0.25) | (x == y), lambda: (data(2, 37), data(37))),
    "order of integers and a fraction": (lambda n: (n > 2.5) | (n == -3), lambda: (whole(2, 37),)),
    "larger and smaller": (lambda n, m: n.maximum(m) - n.minimum(m + 1), lambda: (whole(2, 37), whole(37))),
    "larger and smaller floats": (lambda x, y: torch.max(x, y) * x.minimum(y), lambda: (data(2, 37), data(37))),
    "where of integers": (lambda m, n: torch.where(m, n, -n), lambda: (bools(2, 37), whole(2, 37))),
    "where of a number": (lambda m, n: torch.where(m, n, 7), lambda: (bools(37), whole(2, 37))),
    "where of numbers": (lambda m: torch.where(m, 1, 2), lambda: (bools(2, 37),)),
    "where of booleans": (lambda m, n: torch.where(m, n, ~n), lambda: (bools(2, 37), bools(2, 37))),
    "filled integers": (lambda n, m: n.masked_fill(m, -100), lambda: (whole(2, 6, 37), bools(37))),
    "filled with a tensor": (lambda x, m: x.masked_fill(m, torch.tensor(2.5)), lambda: (data(2, 37), bools(2, 1))),
    "turned integers": (lambda n: n.transpose(1, 2) + n[:, :1, ::2].transpose(1, 2)[:, :1],
                        lambda: (whole(2, 6, 5),)),
    "a number minus them": (lambda x, n: 1.0 - x + (1 - n), lambda: (data(2, 37), whole(2, 37))),
    "bounds": (lambda x: x.clamp(-0.5, 0.75) + x.clamp_min(0.1) - x.clamp(max=-0.2), lambda: (data(3, 41),)),
    "bounds of an activation": (lambda x: F.hardtanh(x, -0.3, 0.6), lambda: (data(3, 41),)),
    "functions": (lambda x: x.erf() + (x * 5).sin() * x.cos() + x.abs().add(0.1).log(), lambda: (data(3, 141),)),
    "rounding": (lambda x: (9 * x).round() + (9 * x).floor() * 2 + (9 * x).ceil() * 3 + (9 * x).trunc() + x.sign(),
                 lambda: (data(3, 141),)),
    "copied": (lambda n, m: (n.transpose(0, 1).clone(), m.t().contiguous())[0], lambda: (whole(3, 41), bools(3, 4))),
    "six axes": (lambda x: x.permute(0, 2, 4, 1, 3, 5).clone() + 1, lambda: (data(2, 3, 2, 3, 2, 5),)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "lanes"), widths(ELEMENTS))
def test_elements_of_any_type(name: str, lanes: int) -> None:
    run, made = ELEMENTS[name]
    assert_same(run, *made(), lanes=lanes)


def test_elements_that_are_no_numbers_or_beyond_all() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -2.5, 0.5, 2.0**23 + 1, -(2.0**30), torch.inf, -torch.inf, torch.nan, 1e-42, 3.0])
    for run in (
        lambda x: x.round(), lambda x: x.floor(), lambda x: x.ceil(), lambda x: x.trunc(), lambda x: x.sign(),
        lambda x: x.log(), lambda x: x.bool(), lambda x: x != x.flip(0), lambda x: x.maximum(x.flip(0)),
        lambda x: x.minimum(x.flip(0)), lambda x: x < x.flip(0), lambda x: x.clamp(-1, 2), lambda x: x.erf(),
        lambda x: x.unsqueeze(0).amax(0), lambda x: x.amin(0), lambda x: x.max(0)[1], lambda x: x.argmin(0),
        lambda x: x.sin() * 0, lambda x: x.cumsum(0), lambda x: F.pad(x, (0, 1), value=-torch.inf),
    ):  # fmt: skip
        assert_same(run, x, walled=False)


def test_angles_of_many_turns() -> None:
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.logspace(1, 12, 2001), -torch.logspace(1, 12, 2001)])
    for run in (lambda x: x.sin(), lambda x: x.cos()):
        assert_same(run, x)


TABLE, NUMBERS = data(9, 35), torch.tensor([[3, -1, 0], [2, 2, -4]])
LOOKUPS: dict[str, Case] = {
    "rows": (lambda n: F.embedding(n * 1, TABLE), lambda: (numbers(9, 2, 7),)),
    "rows by short numbers": (lambda n: F.embedding(n, TABLE), lambda: (numbers(9, 2, 7, dtype=INTS),)),
    "rows by numbers of a part": (lambda n: F.embedding(n[:, 1:], TABLE), lambda: (numbers(9, 2, 7),)),
    "rows of integers": (lambda n, x: torch.index_select(x, 0, n), lambda: (numbers(9, 7), whole(9, 5))),
    "columns": (lambda n, x: x.index_select(-1, n), lambda: (numbers(9, 20), data(2, 5, 9))),
    "booleans by two": (lambda m, n, k: m[n[:, None], k], lambda: (bools(5, 37), numbers(5, 2), numbers(37, 3, 4)[0])),
    "by three": (lambda x, n: x[n, n, n * 1], lambda: (data(5, 6, 7), numbers(5, 2, 3))),
    "apart": (lambda x, n: x[n, :, n], lambda: (data(5, 6, 7), numbers(5, 2, 3))),
    "behind": (lambda x, n: x[:, :, n, n], lambda: (data(2, 3, 5, 6), numbers(5, 4))),
    "between": (lambda x, n: x[:, n], lambda: (data(2, 5, 37), numbers(5, 4))),
    "from the end": (lambda x, n: x[n - 4], lambda: (data(4, 37), numbers(8, 2, 3))),
    "from the end, known": (lambda x: x[:, NUMBERS] * 2, lambda: (data(2, 4, 37),)),
    "gathered": (lambda x, n: x.gather(1, n), lambda: (data(3, 9, 5), numbers(9, 3, 4, 5))),
    "gathered integers": (lambda x, n: x.gather(-1, n), lambda: (whole(3, 9), numbers(9, 3, 12))),
    "gathered from a turned one": (lambda x, n: x.transpose(0, 1).gather(0, n), lambda: (data(3, 9), numbers(9, 4, 3))),
    "relative places": (lambda x: x.gather(-1, (torch.arange(6)[:, None] - torch.arange(6)).abs().expand(2, 6, 6)),
                        lambda: (data(2, 6, 6),)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "lanes"), widths(LOOKUPS))
def test_entries_by_their_numbers(name: str, lanes: int) -> None:
    run, made = LOOKUPS[name]
    assert_same(run, *made(), lanes=lanes)


@pytest.mark.parametrize(("run", "below"), [
    (lambda x, n: x[n], True), (lambda x, n: x[:, n], True), (lambda x, n: x.gather(0, n[:, None] * 1), False),
    (lambda x, n: x.index_select(1, n * 1), False), (lambda x, n: F.embedding(n + 0, x), False),
])  # fmt: skip
def test_numbers_of_no_entry_are_refused(run: Run, below: bool) -> None:
    x, n = data(6, 6), torch.tensor([0, 5, 3])
    program = Program(simplified(run, x, n), {}, threads=1)
    for wrong in (6, -7, 2**40, -(2**63), *([] if below else [-1])):
        with pytest.raises(AutopruneError, match=r"no entry's|table"):
            program(x, torch.tensor([0, wrong, 3]))
        torch.testing.assert_close(program(x, n), run(x, n))
    if below:
        torch.testing.assert_close(program(x, n - 6), run(x, n - 6))


MOVES: dict[str, Case] = {
    "pad lengths": (lambda x: F.pad(x, (1, 2)), lambda: (data(2, 37),)),
    "pad any axes": (lambda x: F.pad(x, (0, 0, 2, 1, 0, 3), value=0.5), lambda: (data(2, 3, 4, 19),)),
    "pad and cut": (lambda x: F.pad(x, (-2, 3, 1, -1)), lambda: (data(5, 19),)),
    "pad integers": (lambda n: F.pad(n, (1, 0), value=-100), lambda: (whole(2, 37),)),
    "pad with ones": (lambda m: F.pad(m.float(), (4, 0), value=1), lambda: (bools(2, 37),)),
    "flip": (lambda x: x.flip(-1, 0), lambda: (data(3, 4, 37),)),
    "flip integers": (lambda n: n.flip(1), lambda: (whole(3, 37),)),
    "repeat": (lambda x: x.repeat(2, 1, 3, 1), lambda: (data(2, 3, 19),)),
    "repeat booleans": (lambda m: m.repeat(3, 2), lambda: (bools(3, 19),)),
    "roll integers": (lambda n: n.roll((1, -2), (0, 1)), lambda: (whole(3, 19),)),
    "roll an axis twice": (lambda x: (x.roll((1, 3), (0, 1)) + 1).roll((-2, -4), (-1, -2)), lambda: (data(3, 19),)),
    "join integers": (lambda n, m: torch.cat([n, m, n[:, :0]], 1), lambda: (whole(2, 9), whole(2, 3))),
    "join of two types": (lambda n, x: torch.cat([n, x], -1), lambda: (whole(2, 9), data(2, 3))),
    "join booleans": (lambda n, m: torch.cat([n, m]), lambda: (bools(2, 9), bools(3, 9))),
    "join five axes": (lambda x, y: torch.cat([x.transpose(0, 3), y.transpose(1, 4)], 2),
                       lambda: (data(3, 5, 2, 4, 2), data(4, 2, 3, 3, 5))),
    "stack integers": (lambda n, m: torch.stack([n, m], -1), lambda: (whole(2, 9), whole(2, 9))),
    "written in parts": (lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 3, 5), lambda: (data(2, 9, 4),)),
    "written in steps": (lambda x: torch.slice_scatter(x, x[..., :3] * 2, -1, 0, 9, 3), lambda: (data(2, 9),)),
    "written in one place": (lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, -2), lambda: (data(2, 9, 4),)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "lanes"), widths(MOVES))
def test_what_is_moved(name: str, lanes: int) -> None:
    run, made = MOVES[name]
    assert_same(run, *made(), lanes=lanes)


REDUCED: dict[str, Case] = {
    "largest": (lambda x: x.amax(1) + x.amin((0, 1)), lambda: (data(3, 5, 70),)),
    "largest of a line": (lambda x: x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True), lambda: (data(3, 70),)),
    "largest of integers": (lambda n: n.amax(1) - n.amin(-1)[:, :1], lambda: (whole(3, 5, 70),)),
    "length": (lambda x: torch.linalg.vector_norm(x, 2, (1,), True), lambda: (data(3, 5, 70),)),
    "normalized": (lambda x: F.normalize(x, dim=-1) + F.normalize(x, dim=1), lambda: (data(3, 5, 37),)),
    "count": (lambda m: m.sum(1) + m.sum(), lambda: (bools(3, 70),)),
    "sum of integers": (lambda n: n.sum((0, 2)), lambda: (whole(3, 5, 70),)),
    "sum of short integers": (lambda n: n.sum(0), lambda: (whole(3, 70, dtype=INTS),)),
    "mean of all": (lambda x: x.mean() + x.sum(), lambda: (data(3, 70),)),
    "any, all": (lambda m: m.any(1) | m.all(-1), lambda: (bools(3, 70),)),
    "any of floats": (lambda x: x.relu().any(1) | (x + 9).all(-1), lambda: (data(3, 70),)),
    "any of integers": (lambda n: (n.any(0), (n > -9).all(0))[0], lambda: (whole(3, 37),)),
    "largest of an axis": (lambda x: x.max(1)[0] + x.min(1)[0], lambda: (data(3, 5, 37),)),
    "where the largest is": (lambda x: x.argmax(-1) * 100 + x.argmin(-1), lambda: (data(3, 70),)),
    "where, of columns": (lambda x: x.max(1)[1] * 10 + x.argmin(1), lambda: (data(3, 5, 7),)),
    "where, of integers": (lambda n: n.argmax(0, keepdim=True), lambda: (whole(9, 7),)),
    "sums so far": (lambda x: x.cumsum(-1) + x.cumsum(0), lambda: (data(3, 70),)),
    "places by a mask": (lambda n: (n.ne(0).int().cumsum(1) * n.ne(0)).long() + 1, lambda: (whole(3, 37),)),
    "softmax of few": (lambda x: x.softmax(1), lambda: (data(30, 3),)),
    "softmax of few columns": (lambda x: x.softmax(1), lambda: (data(2, 3, 50),)),
    "log softmax": (lambda x: x.log_softmax(-1) + x.log_softmax(0), lambda: (data(30, 37),)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "lanes"), widths(REDUCED))
def test_what_is_reduced(name: str, lanes: int) -> None:
    run, made = REDUCED[name]
    assert_same(run, *made(), lanes=lanes)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_types_and_strides_in_any_mixture(drawn: st.DataObject) -> None:
    axes = drawn.draw(st.integers(1, 5))
    shape = drawn.draw(st.lists(st.integers(1, 5), min_size=axes, max_size=axes))
    types = drawn.draw(st.lists(st.sampled_from([torch.float32, LONGS, INTS, torch.bool]), min_size=2, max_size=2))
    order, steps = drawn.draw(st.permutations(range(axes))), drawn.draw(st.integers(1, 3))
    operation: Any = drawn.draw(st.sampled_from([torch.add, torch.mul, torch.maximum, torch.eq, torch.lt]))
    one, other = (whole(*shape, dtype=dtype, low=-3, high=4) for dtype in types)

    def run(x: Tensor, y: Tensor) -> Any:
        return operation(x.permute(order)[::steps], y.permute(order)[::steps][..., :1])

    assert_same(run, one, other)


def test_what_no_kernel_computes_is_torchs() -> None:
    def bytes_(n: Tensor) -> Tensor:
        return n + 1

    def twice(x: Tensor) -> Tensor:
        return x.roll((1, 1), (0, -2))

    def doubles(x: Tensor) -> Tensor:
        return x.double() * 2

    def counted(n: Tensor) -> Tensor:
        return n.cumsum(1, dtype=torch.uint8)

    for run, x in (
        (bytes_, numbers(256, 5, dtype=torch.uint8)),
        (twice, data(3, 5)),
        (doubles, data(3, 5)),
        (counted, bools(3, 5)),
    ):
        graph = simplified(run, x)
        assert torch_steps(graph, x) != []
        assert torch.equal(Program(graph, {}, threads=1)(x), run(x))


def test_results_of_any_type_are_the_callers() -> None:
    run: Run = lambda n, m: (n + 1, m & (n > 0), n.float() * 2, n.sum())  # noqa: E731
    inputs = (whole(3, 5), bools(3, 5))
    program = Program(simplified(run, *inputs), {}, threads=1)
    first = program(*inputs)
    kept = [each.clone() for each in first]
    program(inputs[0] + 1, inputs[1])
    for got, held, wanted in zip(first, kept, run(*inputs), strict=True):
        assert torch.equal(got, held)
        assert torch.equal(got, wanted)
        assert got.dtype == wanted.dtype


EMPTIED: dict[str, Run] = {
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "roll": lambda x: torch.cat([x.roll(1, 1), x], 1),
    "pad": lambda x: F.pad(x, (4, 4)),
    "flip": lambda x: x.flip(1),
    "repeat": lambda x: x.repeat(1, 2),
    "cumsum": lambda x: torch.cat([x.cumsum(1), x], 1),
}


@pytest.mark.parametrize("name", EMPTIED)
def test_an_empty_batch_gives_an_empty_result(name: str) -> None:
    run = EMPTIED[name]
    program = Program(simplified(lambda x: run(x.relu()).sigmoid(), data(3, 6)), {}, threads=1)
    assert torch.equal(program(data(0, 6)), run(data(0, 6)))


@pytest.mark.parametrize(("run", "x"), [
    (lambda n: n == 300, numbers(256, 9, dtype=torch.uint8)), (lambda n: n < 2**31, whole(9, dtype=INTS)),
    (lambda n: n + 2**40, whole(9, dtype=INTS)), (lambda n: n.remainder(2**32 + 3), whole(9, dtype=INTS)),
])  # fmt: skip
def test_numbers_that_a_type_does_not_hold_are_torchs(run: Run, x: Tensor) -> None:
    assert torch.equal(Program(simplified(run, x), {}, threads=1)(x), run(x))


@pytest.mark.parametrize("run", [
    lambda x: x.repeat(0, 1), lambda x: x[:0].repeat(3, 1), lambda x: torch.stack([x[:0], x[:0]]),
    lambda x: x[:0].flip(0), lambda x: F.pad(x[:0], (1, 1)), lambda x: x[0, 0].flip(()),
    lambda x: torch.cat([x[:0], x[:0]]), lambda x: x[:0].roll(1, 0), lambda x: x[:0].cumsum(0),
])  # fmt: skip
def test_what_has_no_entries_or_no_axes_is_moved_as_in_torch(run: Run) -> None:
    x = whole(3, 4)
    got, wanted = Program(simplified(run, x), {}, threads=1)(x), run(x)
    assert got.shape == wanted.shape
    assert torch.equal(got, wanted)


def test_no_axes_are_all_of_them_but_for_any_and_all() -> None:
    x = whole(3, 4)
    runs: tuple[Run, ...] = (lambda x: x.any(()), lambda x: x.all(()), lambda x: x.sum(()), lambda x: x.amax(()))
    for run in runs:
        assert torch.equal(Program(simplified(run, x), {}, threads=1)(x), run(x))
