"""Laws of every pattern: masks pass their own check, have the promised sparsity, and keep the most salient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import AutopruneError, ConfigError
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice

EXTRA = {"group": [{"size": 1}, {"size": 3}, {"size": 16}], "n:m": [{"n": 1, "m": 4}, {"n": 4, "m": 8}]}
CHOICES = [Choice(name, args) for name in PATTERNS for args in [{}, *EXTRA.get(name, [])]]


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    out = groups * draw(st.integers(1, 9))
    shape = (out, draw(st.integers(1, 9)), *draw(st.sampled_from([(), (1, 1), (3, 3), (1, 5)])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.rand(shape, generator=generator), groups


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@given(case=weights(), sparsity=st.floats(0.0, 0.99))
def test_a_mask_passes_its_patterns_check(choice: Choice, case: tuple[torch.Tensor, int], sparsity: float) -> None:
    saliency, groups = case
    pattern = PATTERNS.create(choice)
    mask = pattern.mask(saliency, sparsity, groups)
    assert mask.shape == saliency.shape
    assert mask.dtype == torch.bool
    assert mask.any()
    assert pattern.check(mask, groups)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@given(case=weights(), sparsity=st.floats(0.0, 0.99))
def test_a_mask_has_the_feasible_sparsity(choice: Choice, case: tuple[torch.Tensor, int], sparsity: float) -> None:
    saliency, groups = case
    pattern = PATTERNS.create(choice)
    got = 1.0 - pattern.mask(saliency, sparsity, groups).float().mean().item()
    largest_cell = torch.bincount(pattern.cells(tuple(saliency.shape), groups).flatten()).max().item()
    assert abs(got - pattern.feasible(tuple(saliency.shape), sparsity, groups)) <= 2 * largest_cell / saliency.numel()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_check_refuses_a_mask_of_another_pattern(choice: Choice) -> None:
    pattern = PATTERNS.create(choice)
    mask = torch.ones(16, 16, 3, 3, dtype=torch.bool)
    mask[0, :, 0, 0] = torch.arange(16) % 4 != 1  # three of four: no group, channel, filter or n:m mask
    single_weights = bool((torch.bincount(pattern.cells(tuple(mask.shape)).flatten()) == 1).all())
    assert pattern.check(mask) is (single_weights and choice.name != "n:m")


@given(case=weights(), sparsity=st.floats(0.0, 0.99))
def test_unstructured_keeps_the_most_salient(case: tuple[torch.Tensor, int], sparsity: float) -> None:
    saliency, _ = case
    mask = PATTERNS.create(Choice("unstructured")).mask(saliency, sparsity)
    if not mask.all():
        assert saliency[mask].min() >= saliency[~mask].max()


def test_groups_do_not_straddle_convolution_groups() -> None:
    cells = PATTERNS.create(Choice("group", {"size": 4})).cells((6, 1), conv_groups=2)  # 3 filters a group
    assert len(set(cells[:3].flatten().tolist()) & set(cells[3:].flatten().tolist())) == 0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(AutopruneError, match=r"\[0, 1\)"):
        PATTERNS.create(Choice("group")).mask(torch.rand(8, 8), sparsity)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice("grup"), "Did you mean 'group'"),
        (Choice("group", {"sise": 8}), "Did you mean 'size'"),
        (Choice("group", {"size": 0}), "from 1 to 1024"),
        (Choice("n:m", {"n": 4, "m": 4}), "1 <= n < m"),
        (Choice("channel", {"size": 8}), "takes no arguments"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(choice: Choice, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PATTERNS.create(choice)
