"""Which extents a call may choose: found out from the model, proven on it, and said where one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError, FileError
from autoprune.repack import ProgramModel, load, repack, save
from autoprune.repack.graph import extents, schema
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Op
from autoprune.repack.graph.proofs import proven
from autoprune.repack.outputs import same_output

Inputs = tuple[Tensor, ...]


class Attend(nn.Module):
    """x (batch, steps, features), mask (steps, steps)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x)
        return cast("Tensor", (q @ q.transpose(1, 2) + mask).softmax(-1) @ q)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.norm(self.stem(x)).relu(), 3, 2, 1)
        x = (self.left(x) + self.right(x)).relu()
        return cast("Tensor", self.out(functional.adaptive_avg_pool2d(x, 1).flatten(1)))


class UNet(nn.Module):
    """Upsampled to the size of what it is put beside, or by a factor."""

    def __init__(self, factor: bool) -> None:
        super().__init__()
        self.factor = factor
        self.down, self.inner, self.out = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        y = self.inner(functional.max_pool2d(x, 2))
        y = functional.interpolate(y, **({"scale_factor": 2} if self.factor else {"size": x.shape[2:]}))
        return cast("Tensor", self.out(torch.cat([x, y], 1)))


class Encoder(nn.Module):
    """A transformer whose table of positions ends."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 12, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return cast("Tensor", self.layer(self.words(ids) + self.places[:, : ids.shape[1]]))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.out = nn.Embedding(9, 6), nn.LSTM(6, 4, bidirectional=True), nn.Linear(8, 3)

    def forward(self, ids: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return cast("Tensor", self.out(self.cell(self.words(ids), (h, c))[0]))


class Cross(nn.Module):
    """Attention of one sequence to another; x and y (batch, steps, 8), or time first."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cast("Tensor", self.attention(x, y, y, need_weights=False)[0])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cast("Tensor", self.layers(x, y))


class Flattened(nn.Module):
    """Tokens in one long row."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.out(x.view(-1, 8)).view(x.shape[0], x.shape[1], 6))


class Folded(Flattened):
    """Heads in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        return cast("Tensor", self.out(x).view(batch * 3, steps, 2).softmax(-1).view(batch, steps, 6))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, steps = self.q(x), x.shape[1]
        hidden = ~torch.ones(steps, steps, dtype=torch.bool).tril()
        return cast("Tensor", (q @ q.transpose(1, 2)).masked_fill(hidden, float("-inf")).softmax(-1) @ q)


def ids(*shape: int) -> Tensor:
    return torch.arange(shape[0] * shape[1]).reshape(shape) % 9


def tagged(steps: int, batch: int) -> Inputs:
    return ids(steps, batch), torch.randn(2, batch, 4), torch.randn(2, batch, 4)


def images(*shapes: tuple[int, int, int]) -> list[Inputs]:
    return [(torch.randn(n, 3, high, wide),) for n, high, wide in shapes]


def masked(*sizes: tuple[int, int]) -> list[Inputs]:
    return [(torch.randn(batch, steps, 6), torch.randn(steps, steps)) for batch, steps in sizes]


def sequences(*shapes: tuple[int, int]) -> list[Inputs]:
    return [(torch.randn(*shape, 8),) for shape in shapes]


def pairs(*sizes: tuple[int, int, int], axis: int = 0) -> list[Inputs]:
    """Of (batch, steps, steps), the batch on an axis."""
    return [
        tuple(torch.randn(batch, n, 8) if axis == 0 else torch.randn(n, batch, 8) for n in steps)
        for batch, *steps in sizes
    ]


CASES: dict[str, tuple[Callable[[], nn.Module], list[Inputs]]] = {  # the first is the example
    "extent of the batch by chance": (Attend, masked((5, 5), (1, 5), (2, 7), (3, 1))),
    "adaptive pooling": (Residual, images((2, 32, 32), (1, 64, 48), (3, 45, 33), (1, 32, 32))),
    "one image": (Residual, images((1, 48, 48), (2, 48, 48), (1, 33, 70))),
    "fully convolutional": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2)),
        images((2, 8, 8), (1, 5, 9), (3, 1, 1)),
    ),
    "pooling to parts": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5)
        ),
        images((2, 4, 4), (1, 4, 4), (1, 8, 12), (2, 9, 7)),
    ),
    "interpolation to a size": (lambda: UNet(False), images((2, 16, 16), (1, 12, 20), (1, 13, 9))),
    "interpolation by a factor": (lambda: UNet(True), images((2, 16, 16), (1, 12, 20), (0, 16, 16))),
    "attention to another": (Cross, pairs((2, 5, 7), (1, 5, 7), (4, 3, 3), (3, 1, 9))),
    "attention to another, one sample": (Cross, pairs((1, 5, 7), (4, 5, 7), (2, 9, 1))),
    "attention to another, as long": (Cross, pairs((5, 5, 5), (2, 5, 5), (3, 4, 7))),
    "attention to another, time first": (lambda: Cross(False), pairs((2, 5, 7), (1, 4, 4), axis=1)),
    "decoder": (Decoder, pairs((2, 5, 7), (1, 4, 9), (3, 1, 1))),
    "decoder, one step of one": (Decoder, pairs((1, 1, 7), (3, 1, 7), (2, 5, 3))),
    "flattened": (Flattened, sequences((2, 6), (2, 1), (1, 1), (0, 6), (3, 7))),
    "folded": (Folded, sequences((2, 6), (5, 12), (2, 1), (3, 3), (0, 6))),
    "causal, one step": (Causal, sequences((2, 1), (2, 5), (1, 1), (3, 9))),
    "causal, one step of one": (Causal, sequences((1, 1), (2, 5))),
    "no sample": (Causal, sequences((0, 6), (2, 6), (1, 3))),
    "no step": (Flattened, sequences((2, 0), (2, 6), (1, 1))),
    "no image": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images((0, 8, 8), (2, 8, 8))),
    "any length": (Encoder, [(ids(2, 7),), (ids(3, 9),), (ids(1, 12),), (ids(1, 1),)]),
    "recurrent, time first": (Tagger, [tagged(6, 3), tagged(2, 5), tagged(1, 1)]),
    "recurrent, one step of one": (Tagger, [tagged(1, 1), tagged(4, 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_other_extents_run_without_a_new_repack(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, calls = CASES[name]
    model = make().eval()
    fast = repack(model, calls[0], form="program")
    save(fast, tmp_path / "model.packed")
    loaded = load(tmp_path / "model.packed")
    for given in calls:
        with torch.no_grad():
            wanted = model(*given)
            assert same_output(fast(*given), wanted)
            assert same_output(loaded(*given), wanted)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return functional.avg_pool2d(y, 2) if x.shape[2] > 20 else cast("Tensor", y)


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(x)
        return y[0] if x.shape[0] == 1 else cast("Tensor", y)


def test_an_extent_on_another_branch_is_refused() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    fast = repack(model, images((2, 32, 32))[0], form="program")
    (given,) = images((1, 21, 9))[0]
    with torch.no_grad():
        assert same_output(fast(given), model(given))
    with pytest.raises(AutopruneError, match=r"asks that 20 < axis 2 of 'x'\. Repack it for these shapes"):
        fast(torch.zeros(1, 3, 20, 9))


def test_an_extent_of_one_that_the_model_takes_otherwise_is_refused() -> None:
    fast = repack(Single().eval(), torch.randn(3, 6), form="program")
    assert fast(torch.zeros(2, 6)).shape == (2, 4)
    with pytest.raises(AutopruneError, match=r"asks that 2 <= axis 0 of 'x'"):
        fast(torch.zeros(1, 6))


class Queries(nn.Module):
    """Learned queries for each sample; ``len`` is a number, which torch fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.attention = nn.Parameter(torch.randn(1, 2, 8)), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.attention(self.queries.expand(len(x), -1, -1), x, x, need_weights=False)[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_an_extent_that_torch_fixes_is_the_example_s(batch: int) -> None:
    model, x = Queries().eval(), torch.randn(batch, 5, 8)
    fast = repack(model, x, form="program")
    assert isinstance(fast, ProgramModel)
    for given in (x, torch.randn(batch, 7, 8)):
        with torch.no_grad():
            assert same_output(fast(given), model(given))
    with pytest.raises(AutopruneError, match="made for an input"):
        fast(torch.randn(3, 5, 8))


class Lonely(nn.Module):
    """One step, or one sample, takes another way."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.out, self.axis = nn.Linear(8, 6), axis

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x)
        return -y if x.shape[self.axis] == 1 else y


@pytest.mark.parametrize("axis", [0, 1])
def test_an_example_of_one_on_a_branch_of_its_own_is_fixed(axis: int) -> None:
    model, x = Lonely(axis).eval(), torch.randn(1, 1, 8)
    fast = repack(model, x, form="program")
    with torch.no_grad():
        assert same_output(fast(x), model(x))
    with pytest.raises(AutopruneError, match="made for an input"):
        fast(torch.randn(3, 1, 8) if axis == 0 else torch.randn(1, 3, 8))


def test_what_the_model_asks_of_its_extents_is_said() -> None:
    encoder = repack(Encoder().eval(), ids(2, 7), form="program")
    with pytest.raises(AutopruneError, match=r"axis 1 of 'ids' <= 12"):
        encoder(ids(1, 13))
    unet = repack(UNet(True).eval(), images((2, 16, 16))[0], form="program")
    with pytest.raises(AutopruneError, match=r"2 \* \(\(axis 2 of 'x'\) // 2\) == axis 2 of 'x'"):
        unet(torch.zeros(1, 3, 13, 16))
    attend = repack(Attend().eval(), masked((2, 5))[0], form="program")
    with pytest.raises(AutopruneError, match=r"extents differ: \[4, 5\]\. Axis 1 of 'mask' and axis 1 of 'x' have one"):
        attend(torch.zeros(2, 5, 6), torch.zeros(5, 4))


def test_extents_that_have_one_value_are_fixed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 5)).eval()
    fast = repack(model, torch.randn(2, 3, 8, 8), form="program")
    assert isinstance(fast, ProgramModel)
    assert fast.program.graph.inputs[0].free == (0,)
    with pytest.raises(AutopruneError, match=r"\(2, 3, 8, 8\) \(any batch size\), not \(2, 3, 8, 9\)"):
        fast(torch.zeros(2, 3, 8, 9))


class Windows(nn.Module):
    """Pads its maps to whole windows of 7 before each of its stages, which halve them."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(2, 2, 3, stride=2, padding=1) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            high, wide = x.shape[2:]
            x = stage(functional.pad(x, (0, (7 - wide % 7) % 7, 0, (7 - high % 7) % 7)))
        return x


@pytest.mark.parametrize(("stages", "free"), [(1, (0, None, 1, 2)), (6, (0,))])
def test_extents_are_free_unless_what_follows_from_them_is_intricate(stages: int, free: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Windows(stages).eval(), torch.randn(2, 2, 60, 60)
    captured = capture(model, x)
    assert captured.inputs[0].free == free
    fast = repack(model, x, form="program")
    for given in (x, torch.randn(3, 2, 60, 60), *([torch.randn(1, 2, 45, 50)] if stages == 1 else [])):
        with torch.no_grad():
            assert same_output(fast(given), model(given))


# What is proven ------------------------------------------------------------------------------------------------------


def graph(*free: tuple[int, ...], conditions: tuple[Any, ...] = ()) -> Graph:
    inputs = tuple(Input(f"x{at}", (3, 5)[: len(each)], "float32", each) for at, each in enumerate(free))
    return Graph(inputs, (), inputs[0].name, {}, conditions)


def test_an_extent_that_fails_on_the_model_is_fixed() -> None:
    found = proven(graph((0, 1)), lambda chosen: 1 not in chosen)
    assert [each.free for each in found.inputs] == [(0,)]


def test_extents_that_vary_together_alone_become_one() -> None:
    def right(chosen: Any) -> bool:
        return bool(chosen.get(0, 3) == chosen.get(2, 3))

    found = proven(graph((0, 1), (2,), conditions=(["le", {"extent": 2}, 9],)), right)
    assert [each.free for each in found.inputs] == [(0, 1), (0,)]
    assert found.conditions == (["le", {"extent": 0}, 9],)


def test_conditions_of_fixed_extents_are_gone() -> None:
    whole = graph((0, 1), conditions=(["eq", {"extent": 1}, 5], ["lt", {"extent": 1}, {"extent": 0}]))
    found = proven(replace_condition(whole), lambda chosen: True)
    assert [each.free for each in found.inputs] == [(0,)]
    assert found.conditions == (["lt", {"extent": 0}, 5],)


def test_what_torch_alone_asks_is_gone() -> None:
    """Memory that lies in another way at some extents is no reason; an empty input may be one."""
    asked: Any = (["ne", {"extent": 1}, 1], ["ne", ["mul", {"extent": 0}, {"extent": 1}], 0], ["ne", {"extent": 0}, 4])
    whole = graph((0, 1), conditions=asked)
    assert proven(whole, lambda chosen: True).conditions == ()
    found = proven(whole, lambda chosen: chosen.get(0) != 4 and 0 not in chosen.values())
    assert found.conditions == (asked[2], ["le", 1, {"extent": 0}], ["le", 1, {"extent": 1}])


def replace_condition(whole: Graph) -> Graph:
    """The second of its conditions the other way round."""
    first, (name, left, right) = whole.conditions
    return Graph(whole.inputs, whole.ops, whole.outputs, whole.constants, (first, [name, right, left]))


BAD: dict[str, Any] = {
    "no such extent": ["le", {"extent": 7}, 3],
    "no such operation": ["exec", 1, 2],
    "too few operands": ["le", 1],
    "text": ["le", "1", 2],
    "a fraction": ["le", 1.5, 2],
    "empty": [],
    "a huge number": ["le", {"extent": 0}, 2**40],
}


@pytest.mark.parametrize("name", BAD)
def test_a_condition_of_a_file_is_checked(name: str) -> None:
    data = schema.to_json(graph((0, 1)))
    data["conditions"] = [BAD[name]]
    with pytest.raises(FileError, match="condition"):
        schema.from_json(data, {})


def test_a_condition_nested_without_end_is_refused() -> None:
    condition: Any = {"extent": 0}
    for _ in range(5000):
        condition = ["not", condition]
    data = schema.to_json(graph((0, 1)))
    data["conditions"] = [condition]
    with pytest.raises(FileError):
        schema.from_json(data, {})


def test_conditions_are_computed_and_told() -> None:
    even = ["eq", ["mul", 2, ["floordiv", {"extent": 0}, 2]], {"extent": 0}]
    assert extents.holds(even, {0: 8})
    assert not extents.holds(even, {0: 9})
    assert not extents.holds(["mod", 3, ["add", {"extent": 0}, -1]], {0: 1})
    assert extents.holds(["ne", ["mod", 3, {"extent": 0}], 0], {0: 0})
    assert extents.told(["or", even, ["lt", ["max", 1, {"extent": 1}], 7]], {0: "a", 1: "b"}) == (
        "2 * (a // 2) == a or max(1, b) < 7"
    )


def test_equal_extents_are_chosen_apart() -> None:
    assert extents.choose({0: 3, 1: 3}, [["le", {"extent": 1}, 4]], lambda _: (3, 8, 4), {3}) == {0: 8, 1: 4}


def test_scalars_of_a_graph_are_shared() -> None:
    fast = repack(UNet(False).eval(), images((2, 16, 16))[0], form="program")
    assert isinstance(fast, ProgramModel)
    scalars = [op.attributes["args"] for op in fast.program.graph.ops if op.kind == "scalar"]
    assert scalars
    assert len(scalars) == len({str(each) for each in scalars})
    assert all(isinstance(op, Op) for op in fast.program.graph.ops)


def test_extents_that_the_model_wants_equal_change_together() -> None:
    equal = [["le", {"extent": 1}, {"extent": 2}], ["le", {"extent": 2}, {"extent": 1}]]
    chosen = extents.choose({0: 2, 1: 12, 2: 12}, equal, lambda number: range(12, 20), {2, 12})
    assert chosen[1] == chosen[2] != 12
    assert chosen[0] != chosen[1]
