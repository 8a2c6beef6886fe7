"""Stored weights: every encoding gives back what it was given, in exactly the bits it says, and trusts nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.patterns.group import Group
from autoprune.registry import Choice
from autoprune.repack.weights.encodings import CANDIDATES, ENCODINGS, Cells, smallest
from autoprune.repack.weights.grouping import GROUP_SIZES
from autoprune.repack.weights.packed import PackedWeight, pack
from autoprune.repack.weights.serialized import restore, store

EVERY = pytest.mark.parametrize("choice", CANDIDATES, ids=str)


@st.composite
def grids(draw: st.DrawFn) -> Cells:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 700))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    density = draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]))
    return Cells(rows, columns, np.flatnonzero(generator.random(rows * columns) < density))


@st.composite
def packs(draw: st.DrawFn) -> PackedWeight:
    """Of any group size, in order or not, with whole filters and whole layers cut at times."""
    groups = draw(st.sampled_from([1, 1, 2]))
    shape = (groups * draw(st.integers(1, 20)), draw(st.integers(1, 9)), *draw(st.sampled_from([(), (1, 1), (3, 3)])))
    groups = groups if len(shape) == 4 else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    weight *= (torch.rand(shape[0], generator=generator) < 0.8).view(-1, *[1] * (len(shape) - 1))
    return pack(weight, groups, draw(st.sampled_from(GROUP_SIZES)))


def same(one: PackedWeight, other: PackedWeight) -> bool:
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(PackedWeight))
    return all(np.array_equal(mine, its) for mine, its in pairs)


@EVERY
@given(cells=grids())
def test_an_encoding_gives_back_what_it_was_given_in_the_bits_it_says(choice: Choice, cells: Cells) -> None:
    encoding = ENCODINGS.create(choice)
    bits = encoding.bits(cells)
    if bits is None:
        assert choice.name == "full"
        assert len(cells.kept) < cells.rows * cells.columns
        return
    stream = encoding.encode(cells)
    assert stream.dtype == np.uint8
    assert len(stream) == -(-bits // 8)
    again = encoding.decode(stream, cells.rows, cells.columns, len(cells.kept))
    assert np.array_equal(again.kept, cells.kept)
    assert len(ENCODINGS.create(smallest(cells)).encode(cells)) <= len(stream)


def test_every_encoding_is_a_candidate() -> None:
    assert {choice.name for choice in CANDIDATES} == set(ENCODINGS)


@EVERY
@given(cells=grids(), seed=st.integers(0, 2**20), count=st.integers(0, 300))
def test_any_bytes_decode_to_cells_of_the_grid_or_are_refused(
    choice: Choice, cells: Cells, seed: int, count: int
) -> None:
    generator, encoding = np.random.default_rng(seed), ENCODINGS.create(choice)
    stream = generator.integers(0, 256, generator.integers(0, 300), np.uint8)
    if encoding.bits(cells) is not None and seed % 2:
        stream, count = encoding.encode(cells).copy(), len(cells.kept)
        if len(stream):
            stream[generator.integers(len(stream))] = generator.integers(256)
    try:
        again = encoding.decode(stream, cells.rows, cells.columns, count)
    except FileError:
        return
    assert len(again.kept) == count
    assert np.array_equal(np.unique(again.kept), again.kept)
    assert count == 0 or 0 <= again.kept[0] <= again.kept[-1] < cells.rows * cells.columns


@pytest.mark.parametrize(
    ("sparsity", "chosen"), [(0.0, "full"), (0.5, "bitmask"), (0.95, "relative(bits=4)"), (0.99, "relative(bits=8)")]
)
def test_the_smallest_encoding_depends_on_the_sparsity(sparsity: float, chosen: str) -> None:
    kept = np.flatnonzero(np.random.default_rng(0).random(64 * 576) >= sparsity)
    assert str(smallest(Cells(64, 576, kept))) == chosen


def test_a_filler_costs_its_own_bits_alone() -> None:
    cells = Cells(1, 100, np.array([0, 16, 99]))  # 0, then 15 skipped: a filler and 0, then 82: five fillers and 7
    assert ENCODINGS.create(Choice("relative", {"bits": 4})).bits(cells) == 4 * (1 + 2 + 6)
    with pytest.raises(ConfigError, match="bits must be one of"):
        ENCODINGS.create(Choice("relative", {"bits": 5}))


@given(packed=packs())
def test_a_stored_weight_comes_back_whole(packed: PackedWeight) -> None:
    stored = store(packed)
    assert same(restore(stored.about, stored.tensors), packed)


@given(packed=packs())
def test_values_of_eight_bits_are_within_half_a_step_of_their_group(packed: PackedWeight) -> None:
    stored = store(packed, 8)
    again = restore(stored.about, stored.tensors)
    error = (again.unpack() - packed.unpack()).abs().flatten(1).amax(1)
    for group in packed.out_index:
        filters = torch.from_numpy(group[group >= 0]).long()
        largest = packed.unpack()[filters].abs().max()
        assert float(error[filters].max()) <= float(largest) / 127 * 0.501
    assert np.array_equal(again.out_index, packed.out_index)


def test_kept_positions_may_come_in_any_order() -> None:
    weight = torch.randn(8, 4, 3, 3) * Group(8).mask(torch.rand(8, 4, 3, 3), 0.5)
    packed = pack(weight)
    backwards = dataclasses.replace(packed, index=packed.index[::-1].copy(), values=packed.values[::-1].copy())
    stored = store(backwards)
    assert same(restore(stored.about, stored.tensors), packed)


def test_zeros_of_large_groups_are_not_stored_where_that_is_smaller() -> None:
    weight = torch.randn(64, 32, 3, 3) * (torch.rand(64, 32, 3, 3) < 0.05)
    packed = pack(weight, size=16)
    stored = store(packed)
    assert stored.about["shared"] is False
    assert len(stored.tensors["values"]) == torch.count_nonzero(weight)
    assert stored.bytes < packed.values.nbytes / 4
    assert same(restore(stored.about, stored.tensors), packed)


@pytest.mark.parametrize("bits", [0, 7, 16, True, "8", None])
def test_values_have_8_or_32_bits(bits: object) -> None:
    with pytest.raises(AutopruneError, match="32 or 8 bits, not"):
        store(pack(torch.ones(4, 4)), bits)  # type: ignore[arg-type]
