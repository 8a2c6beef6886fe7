"""Mixtures of experts, one matrix to a run of rows, in programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoprune.repack import ProgramModel, load, repack, save
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.ops import Experts
from autoprune.repack.outputs import same_output
from tests.repack.grouped_products import Mixture


def test_a_mixture_is_one_program_however_many_tokens_there_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixture().eval(), torch.randn(1, 6, 16)
    made = repack(model, x, form="program", threads=1)
    assert isinstance(made, ProgramModel)
    assert [op.kind for op in made.program.graph.ops].count("experts") == 2
    save(made, tmp_path / "mixture.safetensors")
    loaded = load(tmp_path / "mixture.safetensors", threads=1)
    for shape in ((1, 6, 16), (3, 6, 16), (1, 9, 16)):
        given = torch.randn(shape)
        with torch.inference_mode():
            assert same_output(made(given), model(given))
            assert torch.equal(loaded(given), made(given))


def test_a_run_without_rows_and_rows_without_an_expert() -> None:
    op = Experts("y", ("x", "ends"), {"weight": "w"})
    rows, weight = torch.randn(5, 3), torch.randn(3, 3, 2)
    made = op.evaluate([rows, torch.tensor([2, 2, 4])], {"weight": weight}, {})
    assert torch.equal(made, torch.cat([rows[:2] @ weight[0], rows[2:4] @ weight[2], torch.zeros(1, 2)]))


@pytest.mark.parametrize("ends", [[9, -4, 2], [-1, -1, -1], [5, 1, 100]])
def test_ends_that_no_model_computes_read_nothing_beyond_the_rows(ends: list[int]) -> None:
    op = Experts("y", ("x", "ends"), {"weight": "w"})
    made = op.evaluate([torch.ones(4, 3), torch.tensor(ends)], {"weight": torch.ones(3, 3, 2)}, {})
    assert made.shape == (4, 2)
    assert set(made.flatten().tolist()) <= {0.0, 3.0}


@pytest.mark.parametrize("shape", [(4, 2), (4,), (1, 4, 3)])
def test_rows_that_do_not_fit_are_an_error_before_anything_is_computed(shape: tuple[int, ...]) -> None:
    op, weight = Experts("y", ("x", "ends"), {"weight": "w"}), torch.ones(3, 3, 2)
    with pytest.raises(FAILURES):
        op.evaluate([torch.ones(shape, device="meta"), torch.ones(3, device="meta")], {"weight": weight}, {})
