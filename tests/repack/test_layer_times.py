"""Times of a program's operations and the machine's roofs, on clocks that tick once a look."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.timer import Protocol
from autoprune.repack import ProgramModel, repack
from autoprune.repack.kernels.compiler import host
from autoprune.repack.tuning.layer_times import LayerTime, layer_times
from autoprune.repack.tuning.roofline import (
    CHAINS,
    ROUNDS,
    TILE_ROUNDS,
    TILES,
    _amx_loop,
    _bf16_loop,
    _int8_loop,
    _read_loop,
    bf16_gflops,
    fma_gflops,
    int8_gops,
    int8_instruction,
    l3_gbs,
)

PROTOCOL = Protocol(samples=3, warmup=1)


def ticking(seconds: float = 1e-3) -> Callable[[], float]:
    """Every look takes `seconds`."""
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


class Net(nn.Module):
    """A strided convolution with a shortcut, one layer called twice, a head, and an operator torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.short = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.down(x) + self.short(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return torch.cumprod(self.head(x.mean((2, 3))), 1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.down.weight[:, ::2] = 0
    return model


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def named(rows: tuple[LayerTime, ...], name: str) -> list[LayerTime]:
    return [row for row in rows if row.name == name]


def test_every_operation_has_a_row_in_the_order_it_runs(net: nn.Module) -> None:
    fast, rounds = repack(net, X, threads=1), itertools.count(1)
    done = 0

    def round_done() -> None:
        nonlocal done
        done = next(rounds)

    assert isinstance(fast, ProgramModel)
    rows = layer_times(fast, net, X, PROTOCOL, ticking(), round_done)
    assert done == PROTOCOL.samples
    steps = fast.program.plan((tuple(X.shape),)).lowered.steps
    assert len(rows) == len(steps)
    layers = [row.name for row in rows if row.kind in ("conv2d", "linear")]
    assert sorted(layers) == sorted(["stem", "down", "short", "twice", "twice", "head"])
    assert layers.index("stem") < layers.index("down") < layers.index("twice") < layers.index("head")
    assert [row.backend for row in rows if row.kind == "cumprod"] == ["torch"]
    assert {row.kind for row in rows} >= {"copy", "conv2d", "linear", "cumprod"}
    for row in rows:
        assert (row.median_us, row.min_us) == pytest.approx((1e3, 1e3)), "a look before and one behind each"
        assert row.bytes > 0


def test_what_an_operation_does(net: nn.Module) -> None:
    fast = repack(net, X, threads=1)
    assert isinstance(fast, ProgramModel)
    rows = layer_times(fast, net, X, PROTOCOL, ticking())
    (down,), (stem,), (head,) = named(rows, "down"), named(rows, "stem"), named(rows, "head")
    assert down.sparsity == pytest.approx(0.5)
    assert stem.sparsity == 0.0
    assert down.flops == 2 * (16 * 4 * 9) * (2 * 4 * 4), "two for every kept weight at every position"
    assert stem.flops == 2 * (8 * 4 * 9) * (2 * 8 * 8)
    assert head.flops == 2 * 16 * 4 * 2
    assert down.gflops == pytest.approx(down.flops / 1e-3 / 1e9)
    assert down.intensity == pytest.approx(down.flops / down.bytes)
    assert head.group_size is not None
    stored = 16 * -(-4 // head.group_size) * head.group_size  # whole groups, of the size that timings chose
    values = 4 * (2 * 16 + stored + 2 * 4)  # read, weights, written
    assert values < head.bytes <= 4 * head.group_size * 4 + values + 4 * 64, "and the bias and the indices"
    assert down.tiling is not None
    assert down.group_size == down.tiling.group_size
    assert all(row.flops == 0 for row in rows if row.kind in ("copy", "cumprod"))


def test_dense_layers_are_compared_with_their_own_operation_once(net: nn.Module) -> None:
    fast = repack(net, X, threads=1)
    assert isinstance(fast, ProgramModel)
    rows = layer_times(fast, net, X, PROTOCOL, ticking())
    for name in ("stem", "down", "short", "head"):
        (row,) = named(rows, name)
        assert row.dense_us == pytest.approx(1e3)
        assert row.dense_format == "contiguous", "the first of equals"
    assert [row.dense_us is None for row in named(rows, "twice")] == [False, True]
    assert all(row.dense_us is None for row in rows if row.kind == "copy")


def test_neither_model_changes(net: nn.Module) -> None:
    fast = repack(net, X, threads=1)
    assert isinstance(fast, ProgramModel)
    before, weights = fast(X), {name: value.clone() for name, value in net.state_dict().items()}
    layer_times(fast, net, X, PROTOCOL, ticking())
    assert torch.equal(fast(X), before)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_attention_counts_both_of_its_products() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model, x = Attend(), torch.randn(1, 2, 6, 8)
    fast = repack(model, x, threads=1)
    assert isinstance(fast, ProgramModel)
    (row,) = [row for row in layer_times(fast, model, x, PROTOCOL, ticking()) if row.kind == "attention"]
    assert row.flops == 2 * (2 * 6 * 6 * 8) * 2


def test_what_is_no_program_or_does_not_fit_is_an_error(net: nn.Module) -> None:
    fast = repack(net, X, threads=1)
    assert isinstance(fast, ProgramModel)
    with pytest.raises(AutopruneError, match="shape"):
        layer_times(fast, net, X[:, :3], PROTOCOL, ticking())
    swapped = repack(net, X, form="modules", choose=lambda *_: "dense")
    with pytest.raises(AutopruneError, match="SwappedModel"):
        layer_times(swapped, net, X, PROTOCOL, ticking())  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_is_work_by_time(threads: int) -> None:
    flops = 2 * CHAINS * host().lanes * ROUNDS * threads
    assert fma_gflops(threads, ticking(0.5)) == pytest.approx(flops / 0.5 / 1e9)


def test_the_peak_of_bfloat16_is_work_by_time_or_none() -> None:
    found = bf16_gflops(1, ticking(0.5))
    if found is None:
        pytest.skip("this CPU has no such instruction")
    assert found == pytest.approx(2 * 2 * CHAINS * host().lanes * ROUNDS / 0.5 / 1e9)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_of_bytes_is_work_by_time_of_the_best_instruction(threads: int) -> None:
    per_call = {
        "AMX": TILES * 16 * 16 * 64 * TILE_ROUNDS,  # rows, columns and bytes of a tile's row
        "VNNI": 4 * CHAINS * host().lanes * ROUNDS,
    }
    instruction, found = int8_instruction(), int8_gops(threads, ticking(0.5))
    if instruction is None:
        assert found is None
    else:
        assert found == pytest.approx(2 * per_call[instruction] * threads / 0.5 / 1e9)


def test_the_loop_of_bytes_does_every_round() -> None:
    """The first two vectors are what is multiplied, and the first of the sums too."""
    if host().dot != "vnni":
        pytest.skip("this CPU has no such instruction")
    numbers = torch.zeros(CHAINS, host().lanes, dtype=torch.int32)
    numbers[0], numbers[1] = 0x01010101, 0x02020202
    _int8_loop()(numbers.data_ptr())
    assert (numbers[2:] == 4 * 2 * ROUNDS).all()


def test_the_loop_of_tiles_does_every_round() -> None:
    if not host().amx:
        pytest.skip("this CPU has no such instruction")
    numbers = torch.zeros(2 + TILES, 16, 16, dtype=torch.int32)
    numbers[0], numbers[1] = 0x01010101, 0x02020202
    _amx_loop()(numbers.data_ptr())
    assert (numbers[2:] == 64 * 2 * TILE_ROUNDS).all()


def test_the_loop_of_bfloat16_does_every_round() -> None:
    if bf16_gflops(1, ticking(0.5)) is None:
        pytest.skip("this CPU has no such instruction")
    numbers = torch.zeros(CHAINS, host().lanes)
    numbers[:2] = torch.full((2, 2 * host().lanes), 1.0, dtype=torch.bfloat16).view(torch.float32)
    _bf16_loop()(numbers.data_ptr())
    assert (numbers[2:] == 2 * ROUNDS).all()


def test_the_bandwidth_is_bytes_by_time() -> None:
    assert l3_gbs(ticking(0.5)) == pytest.approx((1 << 25) / 0.5 / 1e9, rel=1e-3)


def test_the_bandwidth_loop_reads_every_float_as_often_as_asked() -> None:
    block = CHAINS * host().lanes
    numbers, sums = torch.arange(5 * block, dtype=torch.float32), torch.zeros(block)
    _read_loop()(numbers.data_ptr(), sums.data_ptr(), 5, 3)
    assert torch.equal(sums, 3 * numbers.reshape(5, block).sum(0))
