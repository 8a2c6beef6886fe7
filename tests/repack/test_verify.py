"""Intermediate forms: what is checked of each, and what is written of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.repack import ProgramModel, capture, repack
from autoprune.repack.lowering.lower import lower
from autoprune.repack.lowering.steps import ARENA, Lowered, NativeStep
from autoprune.repack.lowering.verify import verify


class Model(nn.Module):
    """Convolutions, a residual sum, a Linear, and an operation of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.cumprod(self.out((x + self.second(x)).mean((2, 3))), 1)


@pytest.fixture
def lowered() -> Lowered:
    torch.manual_seed(3)
    fast = repack(Model().eval(), torch.randn(2, 3, 6, 6), form="program")
    assert isinstance(fast, ProgramModel)
    program = fast.program
    return lower(program.graph, program.weights, ((4, 3, 6, 6),), program.target, 1)


def in_arena(lowered: Lowered) -> list[NativeStep]:
    return [step for step in lowered.steps if isinstance(step, NativeStep) and step.writes.slot == ARENA]


def without_a_step(lowered: Lowered) -> Lowered:
    return replace(lowered, steps=lowered.steps[1:])


def in_another_order(lowered: Lowered) -> Lowered:
    return replace(lowered, steps=(*lowered.steps[2:], *lowered.steps[:2]))


def at_one_place(lowered: Lowered) -> Lowered:
    first, second, *_ = in_arena(lowered)
    second.writes.offset = first.writes.offset
    return lowered


def behind_the_arena(lowered: Lowered) -> Lowered:
    in_arena(lowered)[0].writes.offset += 4 * lowered.arena.size
    return lowered


def without_a_result(lowered: Lowered) -> Lowered:
    return replace(lowered, steps=lowered.steps[:-1])


@pytest.mark.parametrize("damage", [without_a_step, in_another_order, at_one_place, behind_the_arena, without_a_result])
def test_a_program_that_may_not_run_is_found(lowered: Lowered, damage: Callable[[Lowered], Lowered]) -> None:
    assert verify(lowered) is lowered
    with pytest.raises(AssertionError, match=r"before anything writes|overlap|outside an arena|never written"):
        verify(damage(lowered))


def test_forms_are_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_DUMP", str(tmp_path))
    x = torch.randn(2, 3, 6, 6)
    repack(Model().eval(), x, form="program")
    names = [path.name.partition("-")[2] for path in sorted(tmp_path.iterdir())]
    assert names[0] == "captured.txt"
    assert "fuse_activation.txt" in names
    assert names.index("simplified.txt") < names.index("lowered.txt")
    text = next(path for path in sorted(tmp_path.iterdir()) if "lowered" in path.name).read_text()
    assert "torch aten.cumprod.default" in text
    graph = capture(Model().eval(), (x,))
    assert "returns" in str(graph)
    assert len(str(graph).splitlines()) == len(graph.ops) + 2
