"""Outputs that differ from the model's are told apart from those that do not, and how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoprune.repack.outputs import difference, noise_of

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(("got", "wanted", "told"), [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), ""),
    (torch.tensor([NAN, INF]), torch.tensor([NAN, INF]), ""),
    (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]),
     "differs in 1 of 2 values, by up to 0.5 where the model's largest is 2"),
    (torch.tensor([0.5]), torch.tensor([0.0]), "differs in 1 of 1 values, by up to 0.5 where the model's largest is 0"),
    (torch.tensor([1.0, 0.0, -INF]), torch.tensor([1.0, NAN, INF]),
     "differs in 2 of 3 values, where one of both is infinite or no number"),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs in 1 of 2 values"),
    (torch.tensor([1j]), torch.tensor([1 + 1j]), "differs in 1 of 2 values, by up to 1 where the model's largest is 1"),
    (torch.zeros(2, 1), torch.zeros(2), "is float32 of (2, 1), the model's float32 of (2,)"),
    (torch.zeros(2).double(), torch.zeros(2), "is float64 of (2,), the model's float32 of (2,)"),
])  # fmt: skip
def test_how_an_output_differs(got: Tensor, wanted: Tensor, told: str) -> None:
    assert difference([got], [wanted]) == (f"its output {told}" if told else "")
    found = difference([torch.zeros(1), got], [torch.zeros(1), wanted])
    assert found == (f"its output 2 of 2 {told}" if told else "")


def test_outputs_that_are_missing() -> None:
    assert difference([], [torch.zeros(1)]) == "0 outputs for the model's 1"


@pytest.mark.parametrize("masked", [float("inf"), -float("inf"), float("nan")])
def test_masked_elements_make_no_noise_and_hide_none(masked: float) -> None:
    right = torch.tensor([3.0, masked, -4.0])
    assert noise_of([right.clone()], [right]) == 0.0
    assert noise_of([torch.tensor([3.0, masked, -3.5])], [right]) == pytest.approx(0.1)


def test_a_number_in_the_place_of_an_infinite_one_is_endless_noise() -> None:
    right, ours = torch.tensor([1.0, -float("inf")]), torch.ones(2)
    assert noise_of([ours], [right]) == noise_of([right], [ours]) == float("inf")
    assert noise_of([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")
