"""Laws of all kernels' declarations, found by walking the packages that hold kernels."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from enum import IntEnum
from types import ModuleType
from typing import Any

import llvmlite.ir as ir
import numpy as np
import pytest

from autoprune.repack import kernels, lowering
from autoprune.repack.kernels import gated_gemm, offset_gemm, rows
from autoprune.repack.kernels.compiler import Kernel, call_op, host
from autoprune.repack.kernels.fields import ARRAYS, FLOAT, NUMBER, PRESENCE, SLOT, Fields, Kind, float_bits
from autoprune.repack.kernels.ir import I64, address, at, const, op_function

MODULES: list[ModuleType] = [
    importlib.import_module(found.name)
    for package in (kernels, lowering)
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
KERNELS: list[type[Fields]] = [
    value
    for module in MODULES
    for value in vars(module).values()
    if inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, Fields) and len(value)
]
ALL_FIELDS = [field for kernel in KERNELS for field in kernel]

NEIGHBOURS = np.arange(12, dtype=np.float32).reshape(3, 4)
VALUES: dict[Kind, Any] = {
    Kind.SLOT: 3,
    Kind.OFFSET: 64,
    Kind.NUMBER: -5,
    Kind.FLOAT: 0.5,
    Kind.INT32_ARRAY: np.arange(4, dtype=np.int32),
    Kind.INT64_ARRAY: np.arange(4, dtype=np.int64),
    Kind.FLOAT32_ARRAY: NEIGHBOURS,
}
WRONG: dict[Kind, list[Any]] = {
    Kind.SLOT: [-1, 1.0, "1", None, NEIGHBOURS],
    Kind.OFFSET: [64.0, None, np.arange(4), NEIGHBOURS.T],
    Kind.NUMBER: [5.0, None, "5", np.float64(5.0), NEIGHBOURS],
    Kind.FLOAT: [1, None, np.int64(1), NEIGHBOURS],
    Kind.INT32_ARRAY: [0, np.arange(4, dtype=np.int64), np.arange(8, dtype=np.int32)[::2], [1, 2]],
    Kind.INT64_ARRAY: [0, np.arange(4, dtype=np.int32), np.arange(8, dtype=np.int64)[::2], [1, 2]],
    Kind.FLOAT32_ARRAY: [0.5, NEIGHBOURS.astype(np.float64), NEIGHBOURS.T, NEIGHBOURS[:, 1:], [0.5]],
    Kind.PRESENCE: [0, 1, True],
}


def filled(kernel: type[Fields], *parts: str | None) -> dict[Any, Any]:
    """Values of the right types for all fields that must be given, and for those of `parts`."""
    wanted = (None, *parts)
    return {field: VALUES[field.kind] for field in kernel if not field.follows and field.part in wanted}


def parts_of(kernel: type[Fields]) -> list[str]:
    return sorted({field.part for field in kernel if field.part is not None})


def by_name(value: object) -> str:
    """A test's name."""
    if isinstance(value, Fields):
        return f"{by_name(type(value))}.{value.name}"
    assert isinstance(value, type)
    return value.__module__.rpartition(".")[2]


def test_every_kernel_with_fields_declares_them() -> None:
    using = {module.__name__: module for module in MODULES if "op_function(module)" in inspect.getsource(module)}
    assert {kernel.__module__ for kernel in KERNELS} <= set(using)
    for module in using.values():  # its own, or those of the kernel that does the same with many rows
        assert any(value in KERNELS for value in vars(module).values() if inspect.isclass(value)), module.__name__
    for module in MODULES:  # none is numbered by hand
        field = getattr(module, "Field", None)
        assert field is None or issubclass(field, Fields)


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_fields_have_entries_of_their_own(kernel: Any) -> None:
    assert len(kernel.__members__) == len(set(map(int, kernel)))
    assert all(kernel(int(field)) is field for field in kernel)
    given = filled(kernel, *parts_of(kernel))
    array = kernel.array(given)
    assert array.dtype == np.int64
    assert array.shape == (max(kernel) + 1,)
    for field in kernel:
        value = 1 if field.follows else given[field]
        value = value.ctypes.data if isinstance(value, np.ndarray) else value
        value -= array.ctypes.data if field.kind in ARRAYS else 0
        assert array[field] == (float_bits(value) if field.kind is Kind.FLOAT else value)


@pytest.mark.parametrize("field", [field for field in ALL_FIELDS if not field.follows], ids=by_name)
def test_a_forgotten_field_is_refused(field: Fields) -> None:
    kernel = type(field)
    given = filled(kernel, *parts_of(kernel))
    del given[field]
    if field.part is not None and field.part not in {other.part for other in given}:
        assert kernel.array(given)[field] == 0  # all of its part
        return
    with pytest.raises(TypeError, match=rf"{by_name(kernel)}\.\w+ is not given {field.name}\b"):
        kernel.array(given)


@pytest.mark.parametrize("field", ALL_FIELDS, ids=by_name)
def test_a_value_of_the_wrong_type_is_refused(field: Fields) -> None:
    kernel = type(field)
    for value in WRONG[field.kind]:
        with pytest.raises(TypeError, match=rf"{by_name(kernel)}\.\w+'s field {field.name} takes "):
            kernel.array(filled(kernel, *parts_of(kernel)) | {field: value})


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_a_part_is_left_out_whole(kernel: type[Fields]) -> None:
    for part in parts_of(kernel):
        without, given = kernel.array(filled(kernel)), kernel.array(filled(kernel, part))
        for field in kernel:
            own = without.ctypes.data - given.ctypes.data if field.kind in ARRAYS and without[field] else 0
            if field.part == part:
                assert without[field] == 0
                assert given[field] != 0
            else:
                assert without[field] + own == given[field]


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_another_kernels_field_is_refused(kernel: Any) -> None:
    given = filled(kernel)
    other = next(each for each in KERNELS if each is not kernel)
    stranger = next(field for field in other)
    given.pop(kernel(int(stranger)), None)  # they are equal as numbers
    with pytest.raises(TypeError, match=rf"{by_name(kernel)}\.\w+ has no field .*{stranger.name}"):
        kernel.array(given | {stranger: 0})


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_a_kernel_loads_each_field_from_its_entry(kernel: type[Fields]) -> None:
    module = ir.Module()
    b, fields, slots, _, _ = op_function(module)
    get = kernel.load(b, fields)
    out = b.bitcast(address(b, slots, const(0), const(0)), I64.as_pointer())
    for position, field in enumerate(kernel):
        b.store(get[field], at(b, out, const(position)))
    b.ret_void()
    array, loaded = kernel.array(filled(kernel, *parts_of(kernel))), np.zeros(len(kernel), np.int64)
    base = np.array([loaded.ctypes.data], np.int64)
    call_op(Kernel("loads", host(), lambda: module), array.ctypes.data, base.ctypes.data, 0)
    own = array.ctypes.data
    assert loaded.tolist() == [array[field] + (own if field.kind in ARRAYS else 0) for field in kernel]


def test_a_gated_convolution_has_the_fields_of_one_that_is_not() -> None:
    alike = [field for field in offset_gemm.Field if field.name in gated_gemm.Field.__members__]
    assert len(alike) > 30
    given = {field: VALUES[field.kind] for field in alike if not field.follows}
    shared = gated_gemm.Field.shared(given)
    assert [(int(field), field.name) for field in shared] == [(int(field), field.name) for field in given]
    assert all(type(field) is gated_gemm.Field for field in shared)
    for stranger in (offset_gemm.Field.INSIDE, rows.Field.BIAS):  # of no such name; of another number
        with pytest.raises(TypeError, match=f"has no field like {stranger.name} of"):
            gated_gemm.Field.shared({stranger: 0})


def test_an_array_may_lie_where_an_offset_points() -> None:
    given = filled(rows.Field) | {rows.Field.X_SLOT: 0, rows.Field.X_OFFSET: NEIGHBOURS}
    assert rows.Field.array(given)[rows.Field.X_OFFSET] == NEIGHBOURS.ctypes.data


def test_numbers_rise() -> None:
    class Gaps(Fields):
        A = SLOT
        B = NUMBER.at(5)
        C = NUMBER

    assert list(map(int, Gaps)) == [0, 5, 6]
    assert Gaps.array({Gaps.A: 1, Gaps.B: 2, Gaps.C: 3}).tolist() == [1, 0, 0, 0, 0, 2, 3]
    for late in (0, -1):
        with pytest.raises(TypeError, match="must rise"):

            class Twice(Fields):
                A = SLOT
                B = NUMBER.at(late)


def test_the_presence_is_of_a_part() -> None:
    with pytest.raises(TypeError, match="presence of no part"):

        class Nothing(Fields):
            A = PRESENCE


def test_floats_are_held_as_their_bits() -> None:
    class One(Fields):
        X = FLOAT

    for value in (0.0, -1.5, float("inf"), 1e-3):
        held = One.array({One.X: value}).astype(np.int32)
        assert held.view(np.float32)[0] == np.float32(value)
    assert issubclass(One, IntEnum)
