"""Exponentials, activations and attention at the ends of what floats can hold, and in walled-in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import llvmlite.ir as ir
import pytest
import torch
from torch import Tensor

from autoprune.repack.kernels import math
from autoprune.repack.kernels.compiler import Target, compile_function, host, narrowed
from autoprune.repack.kernels.ir import FLOATS, I64, at, const, load_vector, loop, store_vector
from autoprune.repack.program.graph import ACTIVATIONS

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
