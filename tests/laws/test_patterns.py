"""Laws of every pattern: masks pass their own check, have the promised sparsity, and keep the most salient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import AutopruneError, ConfigError
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.testing import check_pattern
from autoprune.testing.patterns import check_masks

PERMUTED = [{"size": size, "permute": True} for size in (1, 2, 3, 8)]
EXTRA = {
    "group": [{"size": 1}, {"size": 3}, {"size": 16}, {"size": 8, "block": 4}, {"size": 1, "block": 3}, *PERMUTED],
    "n:m": [{"n": 1, "m": 4}, {"n": 4, "m": 8}],
    "block": [{"rows": 1, "columns": 1}, {"rows": 4, "columns": 2}, {"rows": 3, "columns": 5}],
}
CHOICES = [Choice(name, args) for name in PATTERNS for args in [{}, *EXTRA.get(name, [])]]


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    out = groups * draw(st.integers(1, 9))
    shape = (out, draw(st.integers(1, 9)), *draw(st.sampled_from([(), (1, 1), (3, 3), (1, 5)])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.rand(shape, generator=generator), groups


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_pattern_keeps_the_laws(choice: Choice) -> None:
    check_pattern(PATTERNS.create(choice), examples=10)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@given(case=weights(), sparsity=st.floats(0.0, 0.99), data=st.data())
def test_the_laws_hold_for_any_weight(
    choice: Choice, case: tuple[torch.Tensor, int], sparsity: float, data: st.DataObject
) -> None:
    saliency, groups = case
    check_masks(PATTERNS.create(choice), saliency, sparsity, groups, later=data.draw(st.floats(sparsity, 0.99)))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_check_refuses_a_mask_of_another_pattern(choice: Choice) -> None:
    pattern = PATTERNS.create(choice)
    mask = torch.ones(16, 16, 3, 3, dtype=torch.bool)
    mask[0, :, 0, 0] = torch.arange(16) % 4 != 1  # three of four: no group, channel, filter or n:m mask
    mask[9, :, 0, 0] = torch.arange(16) % 4 != 2
    single_weights = bool((torch.bincount(pattern.cells(tuple(mask.shape)).flatten()) == 1).all())
    assert pattern.check(mask) is (single_weights and choice.name != "n:m")


@pytest.mark.parametrize("size", [2, 3, 8])
@given(case=weights(), sparsity=st.floats(0.0, 0.99))
def test_permuted_groups_never_keep_less(size: int, case: tuple[torch.Tensor, int], sparsity: float) -> None:
    saliency, groups = case
    neighbours = PATTERNS.create(Choice("group", {"size": size})).mask(saliency, sparsity, groups)
    permuted = PATTERNS.create(Choice("group", {"size": size, "permute": True})).mask(saliency, sparsity, groups)
    scores = saliency.double()
    assert scores[permuted].sum() >= scores[neighbours].sum() - 1e-9


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rest", [0, 1])
def test_scattered_groups_are_found_again(size: int, groups: int, rest: int) -> None:
    generator = torch.Generator().manual_seed(size)
    kinds = torch.rand(groups, 4, 30, generator=generator)  # of filters that are alike
    shuffles = [torch.randperm(4 * size, generator=generator) % 4 for _ in range(groups)]
    parts = [kind[shuffle] for kind, shuffle in zip(kinds, shuffles, strict=True)]
    saliency = torch.cat([torch.cat([part, torch.zeros(rest, 30)]) for part in parts])
    mask = PATTERNS.create(Choice("group", {"size": size, "permute": True})).mask(saliency, 0.75, groups)
    best = saliency.flatten().topk(int(mask.sum())).values.sum().item()
    assert saliency[mask].sum().item() == pytest.approx(best, rel=0.01)


def test_permuted_groups_gain_much_where_filters_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    profiles = torch.rand(8, 16, 3, 3, generator=generator) ** 4
    saliency = profiles.repeat(8, 1, 1, 1) + 0.1 * torch.rand(64, 16, 3, 3, generator=generator)  # neighbours differ
    kept = [
        saliency[PATTERNS.create(Choice("group", {"size": 8, "permute": permute})).mask(saliency, 0.75)].sum()
        for permute in (False, True)
    ]
    assert kept[1] > 1.3 * kept[0]


def test_a_permuted_mask_is_the_same_every_time() -> None:
    saliency = torch.rand(48, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    pattern = PATTERNS.create(Choice("group", {"size": 8, "permute": True}))
    assert torch.equal(pattern.mask(saliency, 0.75), pattern.mask(saliency.clone(), 0.75))


def test_permuted_groups_stay_within_a_group_of_the_convolution() -> None:
    half = torch.rand(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    saliency = torch.cat([half, half])  # every filter's best partner is in the other half
    pattern = PATTERNS.create(Choice("group", {"size": 2, "permute": True}))
    mask = pattern.mask(saliency, 0.5, conv_groups=2)
    assert all(pattern.check(part) for part in mask.chunk(2))


def test_a_permuted_check_counts_the_filters_of_each_kind() -> None:
    pattern = PATTERNS.create(Choice("group", {"size": 2, "permute": True}))
    kinds = torch.eye(4, dtype=torch.bool)
    assert pattern.check(kinds[[0, 1, 2, 0, 2, 1]])
    assert pattern.check(kinds[[0, 1, 0, 1, 3]])  # one filter is left over
    assert not pattern.check(kinds[[0, 1, 0, 0, 2, 2]])
    assert not pattern.check(kinds[[0, 1, 0, 1]], conv_groups=2)
    assert pattern.check(kinds[[0, 0, 1, 1]], conv_groups=2)


def test_groups_are_chosen_for_the_sparsity_they_are_on_the_way_to() -> None:
    saliency = torch.rand(64, 8, 3, 3, generator=torch.Generator().manual_seed(0)) ** 3
    pattern = PATTERNS.create(Choice("group", {"size": 8, "permute": True}))
    at_once, mask = pattern.mask(saliency, 0.9), None
    for sparsity in (0.1, 0.5, 0.9):
        mask = pattern.mask(saliency, sparsity, within=mask, final_sparsity=0.9)
    assert mask is not None
    assert torch.equal(mask, at_once)


@given(case=weights(), sparsity=st.floats(0.0, 0.99))
def test_unstructured_keeps_the_most_salient(case: tuple[torch.Tensor, int], sparsity: float) -> None:
    saliency, _ = case
    mask = PATTERNS.create(Choice("unstructured")).mask(saliency, sparsity)
    if not mask.all():
        assert saliency[mask].min() >= saliency[~mask].max()


def test_groups_do_not_straddle_convolution_groups() -> None:
    cells = PATTERNS.create(Choice("group", {"size": 4})).cells((6, 1), conv_groups=2)  # 3 filters a group
    assert len(set(cells[:3].flatten().tolist()) & set(cells[3:].flatten().tolist())) == 0


def test_groups_with_blocks_keep_neighbouring_inputs_of_one_tap() -> None:
    cells = PATTERNS.create(Choice("group", {"size": 2, "block": 2})).cells((4, 3, 1, 2))
    assert cells[0].reshape(-1).tolist() == [0, 1, 0, 1, 2, 3]  # a channel alone is the last block
    assert torch.equal(cells[1], cells[0])
    assert torch.equal(cells[2], cells[0] + 4)


def test_blocks_are_filters_by_channels_and_do_not_straddle_convolution_groups() -> None:
    cells = PATTERNS.create(Choice("block", {"rows": 2, "columns": 3})).cells((6, 4, 1, 2), conv_groups=2)
    rows = [[0, 0, 0, 1], [0, 0, 0, 1], [2, 2, 2, 3], [4, 4, 4, 5], [4, 4, 4, 5], [6, 6, 6, 7]]
    assert cells[:, :, 0, 0].tolist() == cells[:, :, 0, 1].tolist() == rows


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
        (Choice("group", {"permute": 1}), "true or false"),
        (Choice("group", {"block": 0}), "from 1 to 64"),
        (Choice("group", {"block": 4, "permute": True}), "takes neighbours"),
        (Choice("n:m", {"n": 4, "m": 4}), "1 <= n < m"),
        (Choice("block", {"columns": 0}), "columns must be an integer from 1 to 1024"),
        (Choice("channel", {"size": 8}), "takes no arguments"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(choice: Choice, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PATTERNS.create(choice)
