"""Results of a built model that share memory with each other, and arguments of `build` that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError
from tests.repack.built import assert_same, built, needs_compiler, program
from tests.repack.test_native_ops import data


class Body(nn.Module):
    """What is made of a layer's output."""

    def __init__(self, results: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.results = nn.Conv2d(3, 8, 3, padding=1), results

    def forward(self, x: Tensor) -> Any:
        return self.results(self.layer(x).relu() + 1)


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "views of a result": lambda y: (y, y.transpose(1, 2), y[1:], y[..., ::2], y[0, 0, 0, 0]),
    "a result before and after": lambda y: (y.flatten(1), y, y.flatten(2)),
    "of the same shape": lambda y: (y, y.view(y.shape), y[:]),
}


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", RESULTS)
def test_results_that_share_memory_are_all_written(case: str, threads: int, tmp_path: Path) -> None:
    x = data(8, 3, 6, 6)
    fast = program(Body(RESULTS[case]), x, tmp_path, threads)
    model = built(fast, tmp_path / "built", threads=threads)
    with torch.no_grad():
        for given in (x, x.flip(0)):
            assert_same(model(given.numpy()), fast(given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threads": 1.5}, "threads must be an integer of 1 or more, not 1.5"),
        ({"threads": "2"}, "threads must be an integer"),
        ({"threads": True}, "threads must be an integer"),
        ({"name": 3}, "name must be a string, not 3"),
        ({"target": None}, "target is one name, not None"),
        ({"shapes": 3}, "shapes must be a list of sets"),
        ({"shapes": [(8, 3)]}, "shapes must be a list of sets"),
        ({"shapes": [[(8.0, 3, 6, 6)]]}, "a shape of integers"),
        ({"shapes": [[(-1, 3, 6, 6)]]}, "a shape of integers"),
    ],
    ids=str,
)
def test_arguments_that_are_none_are_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    fast = program(Body(lambda y: y), data(1, 3, 6, 6), tmp_path)
    with pytest.raises(AutopruneError, match=said):
        autoprune.build(fast, out=tmp_path / "built", **given)
    assert not (tmp_path / "built").exists()
