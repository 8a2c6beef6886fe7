"""Packing: groups of any size lose nothing, and filters that belong together are found wherever they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoprune.patterns.group import Group
from autoprune.quantization import weight_scales
from autoprune.repack.weights.alignment import LINE_BYTES, on_cache_lines
from autoprune.repack.weights.grouping import GROUP_SIZES, Grouping
from autoprune.repack.weights.packed import find_group_size, pack, pack_rows, stored_density
from autoprune.repack.weights.quads import quads
from autoprune.repack.weights.serialized import restore, store


def pruned(shape: tuple[int, ...], size: int, sparsity: float, groups: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight * Group(size).mask(weight.abs(), sparsity, groups)


def shuffled(weight: Tensor, groups: int = 1, seed: int = 1) -> Tensor:
    """With the filters of each group of the convolution in another order."""
    generator = torch.Generator().manual_seed(seed)
    parts = [part[torch.randperm(len(part), generator=generator)] for part in weight.chunk(groups)]
    return torch.cat(parts)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Of filters drawn from a few supports, with stray zeros and weights at times."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (groups * draw(st.integers(1, 24)), draw(st.integers(1, 9)), *draw(st.sampled_from([(), (1, 1), (3, 3)])))
    groups = groups if len(shape) == 4 else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    kinds = torch.rand(draw(st.integers(1, 5)), *shape[1:], generator=generator) < density
    support = kinds[torch.randint(len(kinds), shape[:1], generator=generator)]
    stray = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.3]))
    return torch.randn(shape, generator=generator) * (support ^ stray), groups


@pytest.mark.parametrize("size", [None, *GROUP_SIZES])
@given(case=weights())
def test_every_size_loses_nothing_and_is_valid(size: int | None, case: tuple[Tensor, int]) -> None:
    weight, groups = case
    packed = pack(weight, groups, size)
    assert packed.validate() is packed
    assert size is None or packed.group_size == size
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("size", GROUP_SIZES)
@given(case=weights())
def test_the_density_is_what_packing_stores(size: int, case: tuple[Tensor, int]) -> None:
    weight, groups = case
    assert stored_density(weight, groups, size) == pytest.approx(
        pack(weight, groups, size).values.size / weight.numel()
    )


@pytest.mark.parametrize("size", GROUP_SIZES)
@given(case=weights())
def test_another_order_never_stores_more_nor_needs_more_groups(size: int, case: tuple[Tensor, int]) -> None:
    weight, groups = case
    columns = weight.flatten(1) != 0
    stored = rows = 0
    for part in columns.chunk(groups):
        live = part[part.any(dim=1)]
        stored += sum(int(each.any(dim=0).sum()) * size for each in live.split(size)) if len(live) else 0
        rows += -(-len(live) // size) - (-(len(part) - len(live)) // size)
    packed = pack(weight, groups, size)
    assert packed.values.size <= stored
    assert packed.groups == rows


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("groups", [1, 2])
def test_scattered_groups_are_found(size: int, sparsity: float, groups: int) -> None:
    weight = shuffled(pruned((48 * groups, 32, 3, 3), size, sparsity, groups), groups)
    packed = pack(weight, groups)
    assert packed.group_size == size
    assert packed.values.size == torch.count_nonzero(weight)  # nothing is stored that is not kept
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rest", [0, 1])
def test_the_groups_of_a_permuted_mask_are_found(size: int, groups: int, rest: int) -> None:
    filters = (6 * size + rest) * groups
    weight = torch.randn(filters, 16, 3, 3, generator=torch.Generator().manual_seed(size))
    mask = Group(size, permute=True).mask(weight.abs(), 0.75, groups)
    assert not Group(size).check(mask, groups)  # it does permute
    packed = pack(weight * mask, groups)
    assert packed.group_size == size
    assert packed.values.astype(bool).sum() == mask.sum()
    assert torch.equal(packed.unpack(), weight * mask)


def test_scattered_groups_of_other_sizes_are_used_where_they_fill_the_kernels() -> None:
    weight = shuffled(pruned((96, 32, 3, 3), 24, 0.75))
    assert find_group_size(weight) == 8
    assert stored_density(weight, 1, 8) == pytest.approx(0.25, abs=1e-3)


def test_filters_with_a_few_stray_weights_are_grouped() -> None:
    clean = pruned((64, 32, 3, 3), 8, 0.75)
    stray = torch.rand(clean.shape, generator=torch.Generator().manual_seed(2)) < 1e-3
    weight = shuffled(torch.where(stray, 1.0, clean))
    density = torch.count_nonzero(weight).item() / weight.numel()
    assert find_group_size(weight) == 8
    assert stored_density(weight, 1, 8) <= 1.05 * density


def test_a_last_group_of_fewer_filters_is_found_too() -> None:
    weight = shuffled(pruned((44, 32, 3, 3), 8, 0.75))
    packed = pack(weight)
    assert packed.group_size == 8
    assert np.sort((packed.out_index >= 0).sum(axis=1)).tolist() == [4, 8, 8, 8, 8, 8]
    assert packed.values.astype(bool).sum() == torch.count_nonzero(weight)


@pytest.mark.parametrize(
    ("pattern_size", "size"), [*((1, size) for size in GROUP_SIZES), (4, 1), (4, 2), (4, 4), (16, 8), (16, 16)]
)
def test_filters_stay_where_they_are_when_that_is_as_good(pattern_size: int, size: int) -> None:
    weight = pruned((64, 16, 3, 3), pattern_size, 0.5)
    assert np.array_equal(Grouping(weight).rows(size).ravel(), np.arange(64))


def test_dead_filters_come_last_and_store_nothing() -> None:
    weight = pruned((40, 16, 3, 3), 4, 0.5)
    weight[1::4] = 0
    packed = pack(weight, 1, 8)
    kept = np.diff(packed.group_pointer)
    assert (kept > 0).tolist() == [True] * 4 + [False] * 2
    assert set(packed.out_index[4:][packed.out_index[4:] >= 0]) == set(range(1, 40, 4))


def test_groups_stay_within_a_group_of_the_convolution() -> None:
    weight = pruned((12, 8, 3, 3), 4, 0.5)
    weight[6:] = weight[:6]  # the likeness across the middle is of no use
    rows = Grouping(weight, 2).rows(4)
    assert all(len({filter_ // 6 for filter_ in row if filter_ >= 0}) == 1 for row in rows.tolist())


def test_the_order_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 8, 3, 3, generator=generator) < torch.rand(64, 1, 1, 1, generator=generator)
    for size in GROUP_SIZES:
        assert np.array_equal(Grouping(weight).rows(size), Grouping(weight.clone()).rows(size))


def test_a_known_grouping_is_taken() -> None:
    weight = shuffled(pruned((32, 8, 3, 3), 4, 0.75))
    grouping = Grouping(weight)
    for size in GROUP_SIZES:
        mine, given_ = pack(weight, 1, size), pack(weight, 1, size, grouping)
        assert np.array_equal(mine.values, given_.values)
        assert given_.out_index is grouping.rows(size)


def test_what_is_read_a_vector_at_a_time_begins_at_a_cache_line() -> None:
    for filters, channels in ((16, 9), (64, 300), (512, 1024)):
        weight = torch.randn(filters, channels)
        rows = np.arange(filters, dtype=np.int32).reshape(-1, 16)
        floats, steps = pack_rows(weight, 1, rows), pack_rows(weight, 1, rows, weight_scales(weight))
        stored = store(floats)
        again = restore(stored.about, stored.tensors)
        assert again.values.ctypes.data % LINE_BYTES == 0
        assert floats.values.ctypes.data % LINE_BYTES == 0
        assert quads(steps).values.ctypes.data % LINE_BYTES == 0
    shifted = np.arange(100, dtype=np.float32)[1:]
    made = on_cache_lines(shifted)
    assert made.ctypes.data % LINE_BYTES == 0
    assert np.array_equal(made, shifted)
    assert on_cache_lines(made) is made
