"""Exponentials, activations and attention at the ends of what floats can hold, and in walled-in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import llvmlite.ir as ir
import numpy as np
import pytest
import torch
from torch import Tensor

from autoprune.repack.graph.activations import ACTIVATIONS
from autoprune.repack.kernels import attention, few_attention, math, rows
from autoprune.repack.kernels.compiler import Target, call_op, compile_function, host, narrowed
from autoprune.repack.kernels.few_rows import few
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.ir import FLOATS, I64, at, const, load_vector, loop, store_vector
from autoprune.repack.lowering.token_nodes import Heads, attention_scratch

LANES = (4, 8, 16)
INF, NAN = float("inf"), float("nan")
POWERS: dict[str, tuple[math.Emit, Callable[[Tensor], Tensor]]] = {
    "exp": (math.exp, torch.exp),
    "exp2": (math.exp2, torch.exp2),
}


def target_of(lanes: int) -> Target:
    """Any width on any machine: LLVM splits vectors that are wider than its registers."""
    return replace(host(), lanes=16) if lanes == 16 else narrowed(lanes)


def applied(emit: math.Emit, x: Tensor, target: Target) -> Tensor:
    """Runs one emitter over any number of floats."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS, FLOATS, I64]), "f")
    source, into, count = function.args
    b = ir.IRBuilder(function.append_basic_block())
    with loop(b, const(0), count, target.lanes) as i:
        value = emit(b, module, load_vector(b, at(b, source, i), target.lanes), target.lanes)
        store_vector(b, value, at(b, into, i), target.lanes)
    b.ret_void()
    padded = torch.cat([x, x.new_zeros(-len(x) % target.lanes)])
    y = torch.empty_like(padded)
    compile_function(module, "f", target, 3)(padded.data_ptr(), y.data_ptr(), padded.numel())
    return y[: len(x)]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", list(POWERS))
def test_a_power_has_two_ulp(name: str, lanes: int) -> None:
    emit, right = POWERS[name]
    x = torch.cat([torch.linspace(-87, 87, 20001), torch.linspace(-1, 1, 2001), torch.tensor([0.0, -0.0, 1e-40])])
    got, wanted = applied(emit, x, target_of(lanes)), right(x.double())
    assert ((got - wanted).abs() <= 2**-22 * wanted).all()
    assert (got[x == 0] == 1).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", list(POWERS))
def test_a_power_ends_in_zero_and_infinity(name: str, lanes: int) -> None:
    emit, right = POWERS[name]
    x = torch.tensor([-INF, -3e38, -1e10, -200.0, INF, 3e38, 1e10, 129.0, NAN])
    got = applied(emit, x, target_of(lanes))
    assert got[:8].tolist() == [0.0] * 4 + [INF] * 4
    assert got[8].isnan()
    gradual = torch.linspace(-130, -80, 5001)  # across the denormal numbers, which may be 0
    assert ((applied(emit, gradual, target_of(lanes)) - right(gradual)).abs() <= 2**-126 + 1e-6 * right(gradual)).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("factor", [-1.0, 2.0, -2.0])
def test_a_power_of_a_multiple_has_the_bits_of_the_multiplied(factor: float, lanes: int) -> None:
    ends = torch.tensor([0.0, -0.0, INF, -INF, 88.0, -88.0, 88.8, -88.8, 44.1, -44.1, 3e38, -3e38, 1e-40])
    x, target = torch.cat([torch.linspace(-95, 95, 20001), ends]), target_of(lanes)
    wanted = applied(math.exp, x * factor, target)
    assert torch.equal(applied(partial(math.exp, factor=factor), x, target).view(torch.int32), wanted.view(torch.int32))
    if factor < 0:
        got, above = applied(partial(math.exp_falling, factor=factor), x.abs(), target), x >= 0
        assert torch.equal(got[above].view(torch.int32), wanted[above].view(torch.int32))
    assert applied(partial(math.exp_falling, factor=-2.0), torch.tensor([NAN]), target).isnan().all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", list(math.BYTE_ACTIVATIONS))
def test_for_bytes_an_activation_is_right_to_0_0002(name: str, lanes: int) -> None:
    x = torch.cat([torch.linspace(-12, 12, 48001), torch.linspace(-1e3, 1e3, 20001), torch.tensor([0.0])])
    error = applied(math.BYTE_ACTIVATIONS[name], x, target_of(lanes)) - ACTIVATIONS[name](x.double())
    own = 1e-7 if target_of(lanes).fused else 1e-6  # of float32
    assert (error.abs() <= 2e-4 + own * x.abs()).all()
    assert applied(math.BYTE_ACTIVATIONS[name], torch.full((5,), NAN), target_of(lanes)).isnan().all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_for_bytes_a_gelu_far_from_zero_is_relu(name: str, lanes: int) -> None:
    size = torch.cat([torch.linspace(4, 1e3, 20001), torch.tensor([1e5, 1e30])])
    x = torch.cat([size, -size])
    got = applied(math.BYTE_ACTIVATIONS[name], x, target_of(lanes))
    if target_of(lanes).fused:
        assert torch.equal(got, x.clamp(min=0))
    else:  # the polynomial ends some bits beside 1
        assert ((got - x.clamp(min=0)).abs() <= 1e-6 * size.repeat(2)).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", list(math.ACTIVATIONS))
def test_every_nan_stays_nan(name: str, lanes: int) -> None:
    bits = [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x3FFFFB, -1]  # quiet, signalling, of any sign
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert applied(math.ACTIVATIONS[name], x, target_of(lanes)).isnan().all()


@pytest.mark.parametrize("name", list(math.ACTIVATIONS))
def test_an_activation_of_large_numbers_is_torchs(name: str) -> None:
    x = torch.tensor([INF, -INF, 1e37, -1e37, 3e38, -3e38, 1e4, -1e4, 89.0, -89.0])
    wanted = ACTIVATIONS[name](x.double()).float()  # in float32 torch's own hardswish overflows
    assert torch.allclose(applied(math.ACTIVATIONS[name], x, host()), wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("lanes", LANES)
def test_tanh_keeps_the_digits_of_small_numbers(lanes: int) -> None:
    size = torch.logspace(-37, 2, 4001)
    x = torch.cat([size, -size])
    got, wanted = applied(math.ACTIVATIONS["tanh"], x, target_of(lanes)), torch.tanh(x.double())
    assert ((got - wanted).abs() <= 4e-7 * wanted.abs()).all()


WALL = 64  # floats of NaN on either side


def walled(count: int) -> tuple[Tensor, Tensor]:
    """A buffer of NaN and its inside."""
    whole = torch.full((count + 2 * WALL,), NAN)
    return whole, whole[WALL : WALL + count]


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, target: Target, thread: int = 0) -> Tensor:
    """Runs the op on (N, heads, tokens, d) views; asserts that it wrote to its output and its scratch alone."""
    batch, heads, queries, width = q.shape
    size = attention_scratch(Heads(batch, heads, queries, k.shape[2], width, v.shape[3]), target)
    kernel = few_attention.attention if few(queries) else attention.attention
    out, y = walled(q.numel())
    work, scratch = walled(size * 3)
    result = y.view(batch, queries, heads, width).transpose(1, 2)
    f = attention.Field
    given: dict[attention.Field, Given] = {
        f.HEADS: heads, f.QUERIES: queries, f.KEYS: k.shape[2], f.WIDTH: width,
        f.VALUE_WIDTH: v.shape[3], f.SCALE: float(scale),
        f.SCRATCH_SLOT: 1, f.SCRATCH_OFFSET: 0, f.SCRATCH: size,
    }  # fmt: skip
    slots = np.array([0, scratch.data_ptr()], np.int64)
    for name, view in (("Q", q), ("K", k), ("V", v), ("Y", result)):
        given |= {f[f"{name}_SLOT"]: 0, f[f"{name}_OFFSET"]: view.data_ptr()}
        given |= {f[f"{name}_{axis}"]: view.stride(at) for at, axis in enumerate(("IMAGE", "HEAD", "TOKEN"))}
    fields = f.array(given)
    for item in range(batch * heads):
        call_op(kernel(target), fields.ctypes.data, slots.ctypes.data, item, thread)
    for whole, count in ((out, q.numel()), (work, 3 * size)):
        assert whole[:WALL].isnan().all()
        assert whole[WALL + count :].isnan().all()
    others = torch.cat([scratch[: thread * size], scratch[(thread + 1) * size :]])
    assert others.isnan().all()
    return result


def attention_of(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In float64."""
    q, k, v = q.double(), k.double(), v.double()
    return (torch.einsum("bhqd,bhkd->bhqk", q, k) * scale).softmax(-1) @ v


def taken_apart(tokens: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, k, v as views of one Linear's output that has NaN on either side."""
    _, inside = walled(2 * tokens * 3 * heads * width)
    inside.normal_()
    q, k, v = inside.view(2, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@pytest.mark.parametrize("lanes", LANES)
def test_attention_of_any_size_reads_views_and_stays_inside(lanes: int) -> None:
    for turn in range(40):
        torch.manual_seed(turn)
        tokens, heads, width = (int(torch.randint(1, most, ())) for most in (41, 4, 71))
        q, k, v = taken_apart(tokens, heads, width)
        scale = float(torch.randn(())) / width**0.5
        got = attended(q, k, v, scale, target_of(lanes), thread=turn % 3)
        assert torch.allclose(got.double(), attention_of(q, k, v, scale), atol=2e-6)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (5, 33), (6, 1), (13, 17), (40, 3)])
def test_attention_of_other_keys_than_queries(lanes: int, queries: int, keys: int) -> None:
    torch.manual_seed(keys)
    q, k, v = torch.randn(2, 2, queries, 20), torch.randn(2, 2, keys, 20), torch.randn(2, 2, keys, 20)
    got = attended(q, k, v, 0.3, target_of(lanes))
    assert torch.allclose(got.double(), attention_of(q, k, v, 0.3), atol=2e-6)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("spot", ["q", "k", "v"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_attention_passes_what_is_not_finite(lanes: int, spot: str, value: float) -> None:
    torch.manual_seed(0)
    for tokens, width in ((5, 3), (21, 12), (40, 16)):  # with and without padding, in tiles and alone
        views = dict(zip("qkv", taken_apart(tokens, 2, width), strict=True))
        views["q"].abs_()  # a key of minus infinity has no share
        for place in (0, tokens // 2, tokens - 1):
            at_spot = {name: view.clone() for name, view in views.items()}
            at_spot[spot][1, 1, place] = value
            q, k, v = at_spot.values()
            got, wanted = attended(q, k, v, 0.5, target_of(lanes)), attention_of(q, k, v, 0.5)
            assert torch.allclose(got.double(), wanted, atol=2e-6, equal_nan=True)
            assert got[0].isfinite().all()


def test_attention_of_scores_that_no_exponential_holds() -> None:
    torch.manual_seed(0)
    q, k, v = taken_apart(30, 2, 16)
    for scale in (1e3, -1e3):
        assert torch.allclose(attended(q, k, v, scale, host()).double(), attention_of(q, k, v, scale), atol=2e-2)
    assert torch.allclose(attended(q, k, v, 0.0, host()).double(), attention_of(q, k, v, 0.0), atol=2e-6)


def normed(x: Tensor, weight: Tensor, bias: Tensor, block: int, target: Target) -> Tensor:
    """Runs the op on rows; asserts that it wrote to its output alone, and each item to its rows."""
    count, features = x.shape
    out, y = walled(x.numel())
    f = rows.Field
    fields = f.array({
        f.X_SLOT: 0, f.X_OFFSET: x.data_ptr(), f.Y_SLOT: 0, f.Y_OFFSET: y.data_ptr(), f.ROWS: count,
        f.FEATURES: features, f.BLOCK: block, f.WEIGHT: weight.numpy(), f.BIAS: bias.numpy(), f.EPSILON: 1e-5,
        f.SHARE: 1 / features,
    })  # fmt: skip
    slots = np.zeros(1, np.int64)
    for item in reversed(range(-(-count // block))):
        call_op(rows.layer_norm(target), fields.ctypes.data, slots.ctypes.data, item)
        assert y[: item * block * features].isnan().all()
    assert out[:WALL].isnan().all()
    assert out[WALL + x.numel() :].isnan().all()
    return y.view_as(x)


@pytest.mark.parametrize("lanes", LANES)
def test_a_norm_of_any_size_stays_inside(lanes: int) -> None:
    for features in range(1, 71):
        torch.manual_seed(features)
        count, block = (int(torch.randint(1, most, ())) for most in (12, 6))
        x = walled(count * features)[1].normal_().view(count, features)
        weight, bias = (walled(features)[1].normal_() for _ in range(2))
        wanted = torch.nn.functional.layer_norm(x.double(), (features,), weight.double(), bias.double(), 1e-5)
        assert torch.allclose(normed(x, weight, bias, block, target_of(lanes)).double(), wanted, atol=2e-5)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_norm_keeps_what_is_not_finite_in_its_row(lanes: int, value: float) -> None:
    x = torch.randn(5, 19)
    x[2, 18] = value
    got = normed(x, torch.ones(19), torch.zeros(19), 2, target_of(lanes))
    assert got.isnan().all(1).tolist() == [False, False, True, False, False]
    assert got[[0, 1, 3, 4]].isfinite().all()
