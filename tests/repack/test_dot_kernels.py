"""The int8 kernels, equal to numpy to the last bit: exact sums, and the same float32 operations behind them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import compiler, dot_amx, dot_gemm, dot_rows, math
from autoprune.repack.kernels.compiler import Kernel, Target, host, narrowed
from autoprune.repack.kernels.dot_products import starts_of
from autoprune.repack.kernels.dot_tile import Form
from autoprune.repack.kernels.fields import Given
from autoprune.repack.lowering.layout import MapLayout
from autoprune.repack.native.op import op_of
from autoprune.repack.weights.quads import QUAD
from tests.repack.processors import run_op
from tests.repack.test_math_kernels import applied

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
NOTHING = np.zeros(1, np.int32)  # in slot 0
WALL = 512  # lanes on either side of an output, which must stay as they are

TARGETS = {
    "host": host(),
    "host, madd": replace(host(), features=host().features + ",-avx512vnni,-avxvnni"),
    "8 lanes": narrowed(8),
    "8 lanes, madd": replace(narrowed(8), features=narrowed(8).features + ",-avxvnni"),
    "4 lanes": narrowed(4),
    "4 lanes, plain": replace(narrowed(4), features=narrowed(4).features + ",-ssse3"),
}


def fma(a: Any, b: Any, c: Any) -> Floats:
    """``a * b + c`` of float32, rounded once."""
    a, b, c = (np.asarray(each, np.float32).astype(np.float64) for each in (a, b, c))
    total: Floats = (a * b + c).astype(np.float32)
    return total


def activated(name: str, values: Floats, output: str) -> Floats:
    """The kernels' own activation, which other tests compare with torch's; in kernels of bytes it rounds once."""
    table = math.BYTE_ACTIVATIONS if output == "bytes" else math.ACTIVATIONS
    result: Floats = applied(table[name], torch.from_numpy(values.ravel()), host()).numpy()
    return result.reshape(values.shape)


@dataclass(frozen=True)
class Numbers:
    """The epilogue's numbers; scales of activations and residuals are used where there are any."""

    factor: Floats
    bias: Floats
    residual_scale: float
    low: float
    high: float
    inverse: float
    zero: float

    @classmethod
    def draw(cls, rng: np.random.Generator, rows: int, ending: Ending, largest: float) -> Numbers:
        """Such that bytes spread over their range, and beyond its ends, where sums reach to `largest`."""
        spread = 300.0 if ending.output == "bytes" and not ending.activation else 8.0
        factor = (rng.uniform(0.2, 1.5, rows) * spread / largest).astype(np.float32)
        bias = (rng.uniform(-0.5, 1, rows) * spread / 4).astype(np.float32)
        bounds = (-4.0, 5.0)
        if ending.output == "bytes":
            bounds = (float(rng.integers(0, 60)), float(rng.integers(200, 256)))
        one, inverse, zero = (float(np.float32(each)) for each in rng.uniform(0.1, 1, 3))
        return cls(factor, bias, one, *bounds, inverse * 30, zero * 100)


@dataclass(frozen=True)
class Ending:
    """A row of what is tested: the kernel's parameters."""

    rows: int
    output: Form
    residual: Form | Literal[""] = ""
    activation: str = ""
    mixed: bool = False

    def results(self, sums: NDArray[np.int64], numbers: Numbers, residual: Floats | None) -> Floats:
        """Floats of exact sums, rows first; for bytes they are integers."""
        shape = (-1, *[1] * (sums.ndim - 1))
        value = fma(sums.astype(np.float32), numbers.factor.reshape(shape), numbers.bias.reshape(shape))
        if residual is not None:
            value = fma(residual, numbers.residual_scale, value)
        if self.activation:
            value = fma(activated(self.activation, value, self.output), numbers.inverse, numbers.zero)
        value = np.clip(value, np.float32(numbers.low), np.float32(numbers.high))
        return np.rint(value) if self.output == "bytes" else value


def values_of(weights: NDArray[np.int8]) -> Ints:
    """Four weights a row and cell as one integer: (cells, rows, 4) -> (cells, rows)."""
    return np.ascontiguousarray(weights).view(np.int32)[..., 0]


def bytes_of(lanes: Ints) -> Bytes:
    """The bytes of lanes: (..., 4)."""
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(*lanes.shape, QUAD)


def words_of(results: Floats, ending: Ending) -> Ints:
    """Results, rows first, as the 32-bit entries that are stored: four rows of bytes are one."""
    if ending.output == "floats":
        return np.ascontiguousarray(results).view(np.int32)
    lines = results.reshape(-1, QUAD, *results.shape[1:]).astype(np.uint8)
    words: Ints = np.ascontiguousarray(np.moveaxis(lines, 1, -1)).view(np.int32)[..., 0]
    return words


def summed(given: Bytes, weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """Exact sums (rows, positions) of bytes (cells, positions, 4) times weights (cells, rows, 4)."""
    total: NDArray[np.int64] = np.einsum("cpj,crj->rp", given.astype(np.int64), weights.astype(np.int64))
    return total


def picked(given: Bytes, bytes_: Ints) -> Bytes:
    """Of lanes (4 cells, positions, 4) the bytes of mixed cells: (cells, positions, 4)."""
    chosen = given[np.arange(len(given)), :, bytes_.ravel()]
    return np.moveaxis(chosen.reshape(-1, QUAD, given.shape[1]), 1, 2)


def addends(lanes: Bytes, ending: Ending) -> Floats:
    """What lanes (lines, ..., 4) of a residual add to each row, rows first."""
    if ending.residual == "floats":
        return np.ascontiguousarray(lanes).view(np.float32)[..., 0]
    return np.moveaxis(lanes, -1, 1).reshape(-1, *lanes.shape[1:-1]).astype(np.float32)


def starts(weights: NDArray[np.int8], pointer: Ints) -> Ints:
    """What the sums of each row of each group start from, on targets that multiply signed bytes."""
    sums = weights.astype(np.int64).sum(axis=2)
    return starts_of(np.concatenate([sums[begin:end].sum(axis=0) for begin, end in pairwise(pointer)]))


def lists(rng: np.random.Generator, groups: int, most: int) -> Ints:
    """How a group's cells follow each other: some groups have none."""
    counts = np.where(rng.random(groups) < 0.2, 0, rng.integers(1, most + 1, groups))
    return np.concatenate([[0], counts.cumsum()]).astype(np.int32)


@dataclass(frozen=True)
class Convolution:
    """One op: its fields, what it is given, and what it must write."""

    layout: MapLayout
    fields: dict[dot_gemm.Field, Given]
    x: Ints
    residual: Ints
    items: int
    wanted: Ints  # (images, channels, positions)

    def run(self, kernel: Kernel, rng: np.random.Generator, batch: int) -> Ints:
        """The output's memory, walls and all, after all items in any order."""
        y: Ints = rng.integers(-(2**31), 2**31, self.layout.size(batch) + 2 * WALL, np.int32)
        before = y.copy()
        op = op_of("y", kernel, dot_gemm.Field, self.fields, self.items)
        run_op(op, [NOTHING, self.x, y, self.residual], rng.permutation(self.items))
        assert (y[:WALL] == before[:WALL]).all()
        assert (y[-WALL:] == before[-WALL:]).all()
        return y


# long: one draw after another, each from those before it.
def convolution(
    rng: np.random.Generator, ending: Ending, target: Target, extreme: bool = False
) -> tuple[Convolution, int]:
    """Random cells of a random map, or all bytes and weights at their ends; and how many images."""
    f, rows = dot_gemm.Field, ending.rows
    groups, inputs, batch = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(1, 3))
    height, width = int(rng.integers(1, 12)), int(rng.integers(1, 20))
    per_line, per_residual = (4 if form == "bytes" else 1 for form in (ending.output, ending.residual))
    pad, pitch = int(rng.integers(0, 2)), width + int(rng.integers(1, 4))
    x_layout = MapLayout(inputs, height, width, pitch, pad, pad, reach=1)
    lines = groups * rows // per_line
    y_layout = MapLayout(lines, height, width, pitch, pad, pad)
    positions = y_layout.positions
    channel = rng.permutation(lines)
    if rows // per_line > 1 and rng.random() < 0.5:  # rows without a filter repeat the group's first
        channel[-1] = channel[-(rows // per_line)]
    residual_lines = groups * rows // per_residual
    r_layout = replace(y_layout, channels=residual_lines)

    def draw_offsets(shape: tuple[int, ...]) -> Ints:
        lane, dy, dx = rng.integers(0, inputs, shape), *rng.integers(-pad, pad + 1, (2, *shape))
        offsets: Ints = (lane * x_layout.channel(1) + dy * pitch + dx).astype(np.int32)
        return offsets

    def draw_weights(cells: int) -> NDArray[np.int8]:
        if extreme:
            return np.full((cells, rows, QUAD), rng.choice([-127, 127]), np.int8)
        return rng.integers(-127, 128, (cells, rows, QUAD), np.int8)

    pointer, mixed_pointer = lists(rng, groups, 30), lists(rng, groups, 6)
    offsets, weights = draw_offsets((pointer[-1],)), draw_weights(pointer[-1])
    mixed_offsets, mixed_weights = draw_offsets((mixed_pointer[-1], QUAD)), draw_weights(mixed_pointer[-1])
    mixed_bytes = rng.integers(0, QUAD, mixed_offsets.shape, np.int32)
    x = np.full(x_layout.size(batch), -1, np.int32)
    if not extreme:
        x[:] = rng.integers(-(2**31), 2**31, len(x), np.int32)
    residual = rng.integers(-(2**31), 2**31, r_layout.size(batch), np.int32)
    if ending.residual == "floats":
        residual = rng.normal(0, 20, len(residual)).astype(np.float32).view(np.int32)

    def read(memory: Ints, layout: MapLayout, image: int, distance: NDArray[Any]) -> Bytes:
        """The bytes that many distances lead to from each position: (distances, positions, 4)."""
        first = layout.origin + image * layout.image
        return bytes_of(memory[first + distance[..., None] + np.arange(positions)])

    sums = np.zeros((groups * rows, batch, positions), np.int64)
    for image in range(batch):
        for group in range(groups):
            own, cells = slice(group * rows, (group + 1) * rows), slice(*pointer[group : group + 2])
            sums[own, image] = summed(read(x, x_layout, image, offsets[cells]), weights[cells])
            if ending.mixed:
                cells = slice(*mixed_pointer[group : group + 2])
                lanes = read(x, x_layout, image, mixed_offsets[cells].ravel())
                sums[own, image] += summed(picked(lanes, mixed_bytes[cells]), mixed_weights[cells])
    assert abs(sums).max(initial=0) < 2**31
    numbers = Numbers.draw(rng, groups * rows, ending, max(1.0, float(abs(sums).max())))
    added: Floats | None = None
    if ending.residual:
        distance = np.arange(residual_lines) * r_layout.channel(1)
        lanes = np.stack([read(residual, r_layout, image, distance) for image in range(batch)], 1)
        added = addends(lanes, ending)
    words = words_of(ending.results(sums, numbers, added), ending)
    border = int(rng.integers(0, 256)) * 0x01010101 if ending.output == "bytes" else 0
    border = border - 2**32 if border >= 2**31 else border
    words = np.where(y_layout.mask()[:positions] != 0, words, np.int32(border)).astype(np.int32)
    wanted = np.zeros((batch, lines, positions), np.int32)
    for line in reversed(range(lines)):
        wanted[:, channel[line]] = words[line]
    block = int(rng.integers(1, 4)) * target.lanes
    chunk = int(rng.integers(1, groups + 1))
    blocks, chunks = max(1, (positions - target.lanes) // block + 1), -(-groups // chunk)
    fields: dict[dot_gemm.Field, Given] = {
        f.X_SLOT: 1, f.X_OFFSET: 4 * x_layout.origin, f.Y_SLOT: 2, f.Y_OFFSET: 4 * (y_layout.origin + WALL),
        f.X_IMAGE: x_layout.image, f.Y_IMAGE: y_layout.image, f.MASK: y_layout.mask(), f.GROUP_POINTER: pointer,
        f.OFFSETS: offsets, f.VALUES: values_of(weights), f.FACTOR: numbers.factor, f.BIAS: numbers.bias,
        f.Y_CHANNEL: (channel * y_layout.channel(1)).astype(np.int32), f.LOW: numbers.low, f.HIGH: numbers.high,
        f.BORDER_VALUE: border, f.GROUPS: groups, f.POSITIONS: positions, f.CHUNK: chunk, f.BLOCK: block,
        f.CHUNKS: chunks, f.BLOCKS: blocks, f.BATCH: batch, f.CHUNK_STRIDE: 1, f.BLOCK_STRIDE: chunks,
        f.IMAGE_STRIDE: chunks * blocks, f.BORDER: y_layout.behind, f.BORDER_FIRST: y_layout.before,
    }  # fmt: skip
    if target.signed:
        fields[f.START] = starts(weights, pointer) + (starts(mixed_weights, mixed_pointer) if ending.mixed else 0)
    if ending.mixed:
        fields |= {
            f.MIXED_POINTER: mixed_pointer, f.MIXED_OFFSETS: mixed_offsets, f.MIXED_BYTES: mixed_bytes,
            f.MIXED_VALUES: values_of(mixed_weights),
        }  # fmt: skip
    if ending.residual:
        fields |= {
            f.RESIDUAL_SLOT: 3, f.RESIDUAL_OFFSET: 4 * r_layout.origin, f.RESIDUAL_IMAGE: r_layout.image,
            f.RESIDUAL_CHANNEL: (np.arange(residual_lines) * r_layout.channel(1)).astype(np.int32),
            f.RESIDUAL_SCALE: numbers.residual_scale,
        }  # fmt: skip
    if ending.activation:
        fields |= {f.INVERSE: numbers.inverse, f.ZERO: numbers.zero}
    return Convolution(y_layout, fields, x, residual, batch * blocks * chunks, wanted), batch


ENDINGS = (
    Ending(8, "bytes"),
    Ending(16, "bytes", "bytes", mixed=True),
    Ending(4, "bytes", "floats", "gelu", mixed=True),
    Ending(8, "bytes", "bytes", "silu"),
    Ending(1, "floats", mixed=True),
    Ending(2, "floats", "floats"),
    Ending(8, "floats", "bytes", "sigmoid"),
    Ending(16, "floats", "floats", mixed=True),
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_a_convolution_is_equal_to_numpy(ending: Ending, target: str) -> None:
    rng = np.random.default_rng(ENDINGS.index(ending))
    for _ in range(6):
        check_convolution(rng, ending, TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_bytes_and_weights_do_not_saturate(target: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        check_convolution(rng, Ending(8, "floats", mixed=True), TARGETS[target], extreme=True)


def check_convolution(
    rng: np.random.Generator, ending: Ending, target: Target, extreme: bool = False, amx: bool = False
) -> None:
    case, batch = convolution(rng, ending, target, extreme)
    if amx:
        case.fields.update(in_blocks(case.fields, ending))
    kernel = dot_gemm.dot_gemm(
        ending.rows, target, ending.output, ending.activation, ending.residual, ending.mixed, amx
    )
    memory, layout = case.run(kernel, rng, batch)[WALL:], case.layout
    written = sorted(set((np.asarray(case.fields[dot_gemm.Field.Y_CHANNEL]) // layout.channel(1)).tolist()))
    border, positions = case.fields[dot_gemm.Field.BORDER_VALUE], layout.positions
    for image in range(batch):
        for line in written:
            first = layout.origin + image * layout.image + layout.channel(line)
            assert np.array_equal(memory[first : first + positions], case.wanted[image, line])
            assert (memory[first + positions : first + positions + layout.behind] == border).all()
    assert (memory[layout.origin - layout.before : layout.origin] == border).all()


def in_blocks(fields: Mapping[dot_gemm.Field, Given], ending: Ending) -> dict[dot_gemm.Field, Given]:
    """The cells of a convolution as tile registers take them."""
    f = dot_gemm.Field
    lists = [(f.GROUP_POINTER, f.VALUES, [f.OFFSETS])]
    lists += [(f.MIXED_POINTER, f.MIXED_VALUES, [f.MIXED_OFFSETS, f.MIXED_BYTES])] if ending.mixed else []
    given: dict[dot_gemm.Field, Given] = {}
    for pointer, values, read in lists:
        begins, cells, blocks = dot_amx.in_blocks(np.asarray(fields[pointer]), np.asarray(fields[values]))
        given |= {pointer: begins, values: blocks} | {each: np.asarray(fields[each])[cells] for each in read}
    return given


needs_amx = pytest.mark.skipif(not host().amx, reason="this machine has no tile registers, or may not use them")


@needs_amx
@pytest.mark.parametrize("ending", [*ENDINGS, Ending(16, "bytes")], ids=str)
def test_tiles_are_equal_to_numpy(ending: Ending) -> None:
    rng = np.random.default_rng(ending.rows)
    for _ in range(6):
        check_convolution(rng, ending, host(), amx=True)


@needs_amx
def test_the_largest_bytes_and_weights_of_tiles_do_not_saturate() -> None:
    check_convolution(np.random.default_rng(0), Ending(16, "floats", mixed=True), host(), extreme=True, amx=True)


@needs_amx
def test_threads_may_use_tiles() -> None:
    """The system is asked once for all of them."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check_convolution, np.random.default_rng(0), Ending(16, "bytes"), host(), amx=True).result()


def test_tiles_that_the_system_refuses_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_amx_permitted", lambda: False)
    target = compiler.host.__wrapped__()
    assert not target.amx
    assert target.dot == host().dot


def test_a_target_without_tiles_refuses_them() -> None:
    with pytest.raises(AutopruneError, match="no tile registers"):
        dot_gemm.dot_gemm(16, narrowed(8), "bytes", amx=True)


# long: one draw after another, each from those before it.
def check_rows(rng: np.random.Generator, ending: Ending, target: Target, extreme: bool = False) -> None:
    """Random cells over random tokens, as rows and side by side, to neighbouring places and scattered ones."""
    f, rows = dot_rows.Field, ending.rows
    groups, inputs, tokens = int(rng.integers(1, 6)), int(rng.integers(1, 9)), int(rng.integers(1, 20))
    per_line, per_residual = (4 if form == "bytes" else 1 for form in (ending.output, ending.residual))

    def steps(entries: int) -> tuple[int, int]:
        """From a token to the next, and from an entry to the next."""
        return (entries + int(rng.integers(0, 3)), 1) if rng.random() < 0.6 else (1, tokens + int(rng.integers(0, 3)))

    def places(per: int) -> tuple[Ints, Ints, int, int]:
        """Where each entry of all groups lies, where those of each group begin, and the steps."""
        token, entry = steps(groups * rows // per)
        order = rng.permutation(groups)[:, None] * (rows // per) + np.arange(rows // per)
        for group in np.flatnonzero(rng.random(groups) < 0.5):
            order[group] = rng.permutation(order[group])
            if rng.random() < 0.5:
                order[group, -1] = order[group, 0]  # a row without a filter repeats the first
        near = ((np.diff(order, axis=1) == 1).all(axis=1)) & (entry == 1 or order.shape[1] == 1)
        first = np.where(near, order[:, 0] * entry, -1)
        return (order.ravel() * entry).astype(np.int32), first.astype(np.int32), token, entry

    x_token, x_lane = steps(inputs)
    channel, first, y_token, y_entry = places(per_line)
    other_channel, other_first, other_token, other_entry = places(per_residual)
    pointer, mixed_pointer = lists(rng, groups, 40), lists(rng, groups, 6)
    kept, mixed = int(pointer[-1]), int(mixed_pointer[-1])
    offsets, mixed_offsets = (
        (rng.integers(0, inputs, shape) * x_lane).astype(np.int32) for shape in ((kept,), (mixed, QUAD))
    )
    mixed_bytes = rng.integers(0, QUAD, (mixed, QUAD), np.int32)
    weights, mixed_weights = (rng.integers(-127, 128, (cells, rows, QUAD), np.int8) for cells in (kept, mixed))
    x = rng.integers(-(2**31), 2**31, tokens * x_token + inputs * x_lane, np.int32)
    if extreme:
        x[:], weights[:], mixed_weights[:] = -1, -127, -127
    each = np.arange(tokens)
    sums = np.zeros((groups * rows, tokens), np.int64)
    for group in range(groups):
        own, cells = slice(group * rows, (group + 1) * rows), slice(*pointer[group : group + 2])
        sums[own] = summed(bytes_of(x[offsets[cells][:, None] + each * x_token]), weights[cells])
        if ending.mixed:
            cells = slice(*mixed_pointer[group : group + 2])
            lanes = bytes_of(x[mixed_offsets[cells].reshape(-1, 1) + each * x_token])
            sums[own] += summed(picked(lanes, mixed_bytes[cells]), mixed_weights[cells])
    numbers = Numbers.draw(rng, groups * rows, ending, max(1.0, float(abs(sums).max())))
    residual = rng.integers(-(2**31), 2**31, tokens * other_token + groups * rows * other_entry, np.int32)
    if ending.residual == "floats":
        residual = rng.normal(0, 20, len(residual)).astype(np.float32).view(np.int32)
    lanes = bytes_of(residual[other_channel[:, None] + each * other_token])
    added = addends(lanes, ending) if ending.residual else None
    words = words_of(ending.results(sums, numbers, added), ending)
    y = rng.integers(-(2**31), 2**31, tokens * y_token + groups * rows * y_entry, np.int32)
    wanted = y.copy()
    for line in reversed(range(len(channel))):
        wanted[channel[line] + each * y_token] = words[line]
    chunk, block = int(rng.integers(1, groups + 1)), int(rng.integers(1, tokens + 1))
    chunks, blocks = -(-groups // chunk), -(-tokens // block)
    fields: dict[dot_rows.Field, Given] = {
        f.X_SLOT: 1, f.X_OFFSET: 0, f.Y_SLOT: 2, f.Y_OFFSET: 0, f.TOKENS: tokens, f.X_TOKEN: x_token,
        f.Y_TOKEN: y_token, f.GROUP_POINTER: pointer, f.OFFSETS: offsets, f.VALUES: values_of(weights),
        f.FACTOR: numbers.factor, f.BIAS: numbers.bias, f.Y_CHANNEL: channel, f.FIRST: first, f.LOW: numbers.low,
        f.HIGH: numbers.high, f.GROUPS: groups, f.CHUNK: chunk, f.CHUNKS: chunks, f.BLOCK: block,
    }  # fmt: skip
    if target.signed:
        fields[f.START] = starts(weights, pointer) + (starts(mixed_weights, mixed_pointer) if ending.mixed else 0)
    if ending.mixed:
        fields |= {
            f.MIXED_POINTER: mixed_pointer, f.MIXED_OFFSETS: mixed_offsets, f.MIXED_BYTES: mixed_bytes,
            f.MIXED_VALUES: values_of(mixed_weights),
        }  # fmt: skip
    if ending.residual:
        fields |= {
            f.RESIDUAL_SLOT: 3, f.RESIDUAL_OFFSET: 0, f.RESIDUAL_TOKEN: other_token,
            f.RESIDUAL_CHANNEL: other_channel, f.RESIDUAL_FIRST: other_first, f.RESIDUAL_SCALE: numbers.residual_scale,
        }  # fmt: skip
    if ending.activation:
        fields |= {f.INVERSE: numbers.inverse, f.ZERO: numbers.zero}
    kernel = dot_rows.dot_rows(rows, target, ending.output, ending.activation, ending.residual, ending.mixed)
    op = op_of("y", kernel, f, fields, chunks * blocks)
    run_op(op, [NOTHING, x, y, residual], rng.permutation(op.items))
    assert np.array_equal(y, wanted)


ROWS_ENDINGS = (
    Ending(16, "bytes", "bytes", mixed=True),
    Ending(8, "bytes", "floats"),
    Ending(4, "bytes", "", "gelu"),
    Ending(16, "floats", "floats"),
    Ending(8, "floats", "bytes", "silu", mixed=True),
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ending", ROWS_ENDINGS, ids=str)
def test_rows_are_equal_to_numpy(ending: Ending, target: str) -> None:
    rng = np.random.default_rng(ROWS_ENDINGS.index(ending))
    for _ in range(20):
        check_rows(rng, ending, TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_bytes_and_weights_of_rows_do_not_saturate(target: str) -> None:
    check_rows(np.random.default_rng(0), Ending(16, "floats", "floats"), TARGETS[target], extreme=True)


def test_rows_fill_vectors() -> None:
    with pytest.raises(AutopruneError, match="multiple of 4 filters, not of 2"):
        dot_rows.dot_rows(2, host(), "floats")


@pytest.mark.parametrize("form", ["output", "residual"])
def test_bytes_need_whole_lanes_of_filters(form: Literal["output", "residual"]) -> None:
    forms: dict[str, Form] = {"output": "floats", "residual": "floats"}
    forms[form] = "bytes"
    with pytest.raises(AutopruneError, match="multiple of 4 filters, not of 2"):
        dot_gemm.dot_gemm(2, host(), forms["output"], residual=forms["residual"])


def test_a_target_knows_its_dot_product() -> None:
    def of(lanes: int, features: str) -> str:
        return Target(lanes, "", features).dot

    assert of(16, "+avx512bw,+avx512vnni") == "vnni"
    assert of(16, "+avx512bw,-avx512vnni,+avxvnni") == "madd"
    assert of(8, "+avx2,+avxvnni") == "vnni"
    assert of(8, "+avx2,+avx512vnni,+avx512vl") == "vnni"
    assert of(8, "+avx2,+avx512vnni,+avx512vl,-avx512vl") == "madd"
    assert of(8, "+avx") == "plain"
    tiles = "+avx512vnni,+amx-tile,+amx-int8"
    assert Target(16, "", tiles).amx
    assert not Target(16, "", tiles + ",-amx-tile").amx
    assert not Target(8, "", tiles + ",+avxvnni").amx
    assert of(4, "+avx2,+avxvnni") == of(4, "+avx512vnni,+avx512vl") == "vnni"
    assert of(4, "+avx2") == of(4, "") == "plain"
