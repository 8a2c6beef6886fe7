"""A packed weight as a file holds it: which positions are kept, in the smallest encoding, and their values.

Filters of a group share their positions, so positions are told once a group. Where a kernel's groups are larger than
the zeros' own, and so hold zeros, telling them once a filter may be smaller: then only nonzero weights are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.errors import AutopruneError, FileError
from autoprune.quantization.grid import WEIGHT_LEVELS
from autoprune.registry import Choice
from autoprune.repack.weights.alignment import on_cache_lines
from autoprune.repack.weights.encodings import ENCODINGS, Cells, smallest
from autoprune.repack.weights.grouping import GROUP_SIZES
from autoprune.repack.weights.packed import Floats, Ints, PackedWeight, Values, owners, pack_rows
from autoprune.repack.weights.pairs import bits_of, from_bits

VALUE_BITS = (32, 8)
# Unpacking what is told once a filter takes the dense weight: of so many weights one must be kept.
RAREST = 64
# Filters whose order may go untold: what a file makes us allocate is bounded by its own size.
IN_ORDER = 2**20
_INTEGERS = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class StoredWeight:
    """What is written for one layer.

    Attributes:
        about: JSON that says how to read the tensors.
        tensors: ``positions`` (bytes), ``values`` (float32; bfloat16; int8 with ``scales``, one a row; int8 with
            ``filter_scales`` where the weight is of bytes), and ``rows``, the filter of each row, unless the filters
            are in order.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def store(packed: PackedWeight, value_bits: int = 32) -> StoredWeight:
    """The smallest form of a packed weight.

    Args:
        packed: what to store; kept positions may be in any order within a group, and come back rising.
        value_bits: 32, or 8 for values rounded to 1/127 of the largest one of their row; bytes and bfloat16
            numbers stay what they are.

    Raises:
        AutopruneError: no such number of bits.
    """
    check_value_bits(value_bits)
    forms = [_store(packed, *by_group(packed), True, value_bits)]
    weights, kept = int(np.prod(packed.shape, dtype=np.int64)), int(np.count_nonzero(packed.values))
    if packed.group_size > 1 and weights <= RAREST * kept:
        forms.append(_store(packed, *by_filter(packed), False, value_bits))
    return min(forms, key=lambda form: form.bytes)


def check_value_bits(value_bits: int) -> None:
    """Raises AutopruneError when values cannot be stored in so many bits."""
    if value_bits not in VALUE_BITS:
        raise AutopruneError(f"values are stored in {' or '.join(map(str, VALUE_BITS))} bits, not {value_bits!r}.")


def by_group(packed: PackedWeight) -> tuple[Cells, Values]:
    """The kept positions of each group, and their values, ``(kept, group_size)``."""
    columns = int(np.prod(packed.shape[1:], dtype=np.int64))
    row = np.repeat(np.arange(packed.groups, dtype=np.int64), np.diff(packed.group_pointer))
    cell = (row - owners(packed.out_index, packed.shape[0], packed.conv_groups)[row]) * columns + packed.index
    if bool((cell[1:] > cell[:-1]).all()):
        return Cells(packed.groups, columns, cell), packed.values
    order = np.argsort(cell)
    return Cells(packed.groups, columns, cell[order]), packed.values[order]


def by_filter(packed: PackedWeight) -> tuple[Cells, Values]:
    """The nonzero positions of each filter, and their values, ``(nonzeros, 1)``."""
    dense = packed.unpack_values().reshape(packed.shape[0], -1)
    kept = np.flatnonzero(dense)
    return Cells(dense.shape[0], dense.shape[1], kept), dense.reshape(-1, 1)[kept]


def _store(packed: PackedWeight, cells: Cells, values: Values, shared: bool, value_bits: int) -> StoredWeight:
    encoding = smallest(cells)
    about = {
        "shape": list(packed.shape),
        "conv_groups": packed.conv_groups,
        "group_size": packed.group_size,
        "encoding": encoding.to_json(),
        "shared": shared,
    }
    tensors = {"positions": torch.from_numpy(ENCODINGS.create(encoding).encode(cells))}
    if packed.in_bf16:
        tensors["values"] = from_bits(values.view(np.uint16))
    elif packed.scale is not None:
        tensors |= {"values": torch.from_numpy(values), "filter_scales": torch.from_numpy(packed.scale)}
    elif value_bits == 8:
        values = values.astype(np.float32, copy=False)
        quantised, scales = _quantise(values, cells)
        tensors |= {"values": torch.from_numpy(quantised), "scales": torch.from_numpy(scales)}
    else:
        tensors["values"] = torch.from_numpy(values)
    filters = packed.shape[0]
    if filters > IN_ORDER or not np.array_equal(packed.out_index, _in_order(filters, packed.group_size)):
        tensors["rows"] = _narrow(torch.from_numpy(packed.out_index))
    return StoredWeight(about, tensors)


def restore(about: Any, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The packed weight that was stored, validated.

    Raises:
        FileError: the description or a tensor is wrong.
    """
    shape = tuple(_integer(extent) for extent in about["shape"])
    conv_groups, size = _integer(about["conv_groups"]), _integer(about["group_size"])
    rows = _widen(tensors["rows"]) if "rows" in tensors else _in_order(shape[0], size)
    nothing = np.empty(0, np.int32), np.empty((0, size), np.float32)
    PackedWeight(shape, conv_groups, size, np.zeros(len(rows) + 1, np.int32), *nothing, rows).validate()

    shared, columns = flag(about["shared"]), int(np.prod(shape[1:], dtype=np.int64))
    values, scales, positions = tensors["values"], tensors.get("scales"), tensors["positions"]
    of_filters = tensors.get("filter_scales")
    kinds = (torch.float32, torch.bfloat16) if scales is None and of_filters is None else (torch.int8,)
    width = size if shared else 1
    if values.dtype not in kinds or values.dim() != 2 or values.shape[1] != width:
        raise FileError(f"values are {values.dtype} of shape {tuple(values.shape)}")
    if positions.dtype != torch.uint8 or positions.dim() != 1:
        raise FileError(f"positions are {positions.dtype} of shape {tuple(positions.shape)}")
    if not shared and shape[0] * columns > RAREST * len(values):
        raise FileError("its positions cannot be told once a filter")
    encoding = ENCODINGS.create(Choice.from_json(about["encoding"]))
    cells = encoding.decode(positions.numpy(), len(rows) if shared else shape[0], columns, len(values))
    whole = _array(values) if scales is None else on_cache_lines(_dequantise(values.numpy(), scales, cells))
    scale = None if of_filters is None else _checked_scales(of_filters, values, shape[0])
    if shared:  # the decoder has checked the positions, and what is above all else that validate would
        pointer = cells.pointer
        before = (np.arange(len(rows), dtype=np.int64) - owners(rows, shape[0], conv_groups)) * columns
        # In 32 bits, half the memory to pass over: what overflows in both terms cancels out.
        index = cells.kept.astype(np.int32)
        index -= np.repeat(before.astype(np.int32), np.diff(pointer))
        return PackedWeight(shape, conv_groups, size, pointer.astype(np.int32), index, whole, rows, scale)
    dense = np.zeros(shape[0] * columns, np.float32)
    dense[cells.kept] = values.float().numpy()[:, 0] if scales is None else whole[:, 0]
    made = pack_rows(torch.from_numpy(dense).reshape(shape), conv_groups, rows)
    if values.dtype == torch.bfloat16:
        return made.to_bf16()
    return made if scale is None else replace(made, values=made.values.astype(np.int8), scale=scale)


def _checked_scales(scales: Tensor, values: Tensor, filters: int) -> Floats:
    """The scale of each filter of a weight of bytes; raises FileError unless all are right."""
    fine = scales.dtype == torch.float32 and scales.shape == (filters,)
    least = torch.finfo(torch.float32).tiny
    if not fine or not bool((scales.isfinite() & (scales >= least)).all()):
        raise FileError(f"scales of filters are {scales.dtype} of shape {tuple(scales.shape)}, or not all positive")
    if values.numel() and int(values.min()) < -WEIGHT_LEVELS:
        raise FileError("a weight is -128 steps")
    return np.ascontiguousarray(scales.numpy())


def _array(values: Tensor) -> Values:
    """Values as packed weights hold them."""
    return on_cache_lines(bits_of(values) if values.dtype == torch.bfloat16 else values.numpy())


def _quantise(values: Floats, cells: Cells) -> tuple[NDArray[np.int8], Floats]:
    """Values rounded to whole multiples, -127 to 127, of their row's scale; and the scales, ``(rows,)``."""
    kept = np.diff(cells.pointer)
    largest = np.zeros(cells.rows, np.float32)
    largest[kept > 0] = np.maximum.reduceat(np.abs(values).max(axis=1), cells.pointer[:-1][kept > 0])
    scales = largest / np.float32(127)
    steps = np.repeat(np.where(scales > 0, scales, 1), kept)[:, None]
    return np.rint(values / steps).astype(np.int8), scales


def _dequantise(values: NDArray[np.int8], scales: Tensor, cells: Cells) -> Floats:
    if scales.dtype != torch.float32 or scales.shape != (cells.rows,):
        raise FileError(f"scales are {scales.dtype} of shape {tuple(scales.shape)}")
    of_row: Floats = np.repeat(scales.numpy(), np.diff(cells.pointer))[:, None]
    whole: Floats = np.multiply(of_row, values, out=of_row if values.shape[1] == 1 else None)
    return whole


def _in_order(filters: int, size: int) -> Ints:
    """Rows of filters as they come, -1 behind the last one."""
    if filters > IN_ORDER or size not in GROUP_SIZES:
        raise FileError(f"a packed weight of {filters} filters in groups of {size} does not tell their order")
    rows = np.full(-(-filters // size) * size, -1, np.int32)
    rows[:filters] = np.arange(filters)
    return rows.reshape(-1, size)


def flag(value: Any) -> bool:
    """A file's true or false; raises FileError on anything else."""
    if not isinstance(value, bool):
        raise FileError(f"a flag is {value!r}")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:  # JSON holds true, 1.5 and Infinity too
        raise FileError(f"an integer is {value!r}")
    return value


def _narrow(values: Tensor) -> Tensor:
    """The smallest integer type that holds the values; -1 is kept."""
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    fits = (dtype for dtype in _INTEGERS if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)
    return values.to(next(fits))


def _widen(values: Tensor) -> Ints:
    if values.dtype not in _INTEGERS or values.dim() != 2:
        raise FileError(f"rows are {values.dtype} of shape {tuple(values.shape)}")
    return np.ascontiguousarray(values.to(torch.int32).numpy())
