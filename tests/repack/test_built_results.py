"""Results of a built model that share memory with each other: every one of them is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
