"""The native kernels: every vector width, no read or write outside a buffer, and calls that must fail."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import layers, pack
from autoprune.repack.kernels.compiler import Target, host, narrowed
from autoprune.repack.layers import PackedConv2d, PackedLayer, PackedLinear

GROUP_SIZES = (1, 2, 4, 8, 16)
LANES = (4, 8, 16)
NAN = float("nan")


def target_of(lanes: int) -> Target:
    """Any width on any machine: LLVM splits vectors that are wider than its registers."""
    return replace(host(), lanes=16) if lanes == 16 else narrowed(lanes)


def pruned(module: nn.Module, size: int, sparsity: float, groups: int = 1) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(PATTERNS.create(Choice("group", {"size": size})).mask(weight.abs(), sparsity, groups))


def packed_conv(conv: nn.Conv2d, relu: bool = False, target: Target | None = None) -> PackedConv2d:
    assert not isinstance(conv.padding, str)
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    bias = None if conv.bias is None else conv.bias.detach()
    return PackedConv2d(pack(conv.weight, conv.groups), bias, (sh, sw), (ph, pw), (dh, dw), relu, target)


def packed_linear(linear: nn.Linear, relu: bool = False, target: Target | None = None) -> PackedLinear:
    return PackedLinear(pack(linear.weight), None if linear.bias is None else linear.bias.detach(), relu, target)


def make_conv(size: int = 4, sparsity: float = 0.5, **window: int) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, window.pop("kernel", 3), **window)  # type: ignore[arg-type]
    pruned(conv, size, sparsity, conv.groups)
    return conv.eval()


def make_linear(size: int = 4, sparsity: float = 0.5, features: int = 33, out: int = 32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(features, out)
    pruned(linear, size, sparsity)
    return linear.eval()


@torch.inference_mode()
def assert_same(got: nn.Module, wanted: nn.Module, x: Tensor, relu: bool = False) -> None:
    right = wanted(x).relu() if relu else wanted(x)
    answer = got(x)
    assert answer.shape == right.shape
    if right.numel():
        assert (answer - right).abs().max() <= 1e-4 * right.abs().max() + 1e-7


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_every_vector_width_computes_the_same(lanes: int, size: int) -> None:
    target = target_of(lanes)
    rng = random.Random(lanes * 100 + size)
    torch.manual_seed(size)
    for _ in range(20):
        groups, relu = rng.choice([1, 1, 2]), rng.random() < 0.5
        kernel = rng.choice([(1, 1), (3, 3), (1, 5), (2, 3)])
        stride, padding, dilation = ((rng.randint(a, b), rng.randint(a, b)) for a, b in ((1, 2), (0, 2), (1, 2)))
        if kernel == (1, 1) and rng.random() < 0.7:
            stride, padding = (1, 1), (0, 0)
        conv = nn.Conv2d(
            rng.randint(1, 5) * groups, rng.randint(1, 20) * groups, kernel, stride, padding, dilation, groups
        )
        pruned(conv, size, rng.choice([0.0, 0.5, 0.9]), groups)
        x = torch.randn(rng.randint(1, 2), conv.in_channels, rng.randint(5, 30), rng.randint(9, 70))
        assert_same(packed_conv(conv, relu, target), conv, x, relu)
        linear = nn.Linear(rng.randint(1, 60), rng.randint(1, 60))
        pruned(linear, size, rng.choice([0.0, 0.5, 0.9]))
        x = torch.randn(*rng.choice([(), (1,), (7,), (2, 3), (19,), (40,)]), linear.in_features)
        assert_same(packed_linear(linear, relu, target), linear, x, relu)


def test_the_narrow_targets_are_narrow() -> None:
    assert narrowed(4).lanes == 4
    assert narrowed(8).lanes == min(8, host().lanes)


class Walled:
    """Stands in for what a layer allocates: every buffer is NaN between NaN walls that are checked afterwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wall: int = 4096) -> None:
        self.wall, self.buffers = wall, list[tuple[Tensor, int]]()
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda _, shape: self.allocate(shape))
        monkeypatch.setattr(layers, "_scratch", lambda size: self.allocate(size).data_ptr())

    def allocate(self, shape: int | tuple[int, ...]) -> Tensor:
        count = int(np.prod(shape))
        whole = torch.full((count + 2 * self.wall,), NAN)
        self.buffers.append((whole, count))
        return whole[self.wall : self.wall + count].view(shape)

    def assert_intact(self) -> None:
        assert self.buffers
        for whole, count in self.buffers:
            assert whole[: self.wall].isnan().all()
            assert whole[self.wall + count :].isnan().all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize(
    ("window", "extent"),
    [
        ({"kernel": 1}, (17, 23)),
        ({"kernel": 1}, (4, 3)),
        ({"kernel": 1}, (1, 16 * 12)),
        ({"kernel": 1, "stride": 2}, (9, 8)),
        ({"kernel": 3, "padding": 1}, (7, 7)),
        ({"kernel": 3, "padding": 1, "stride": 2}, (16, 15)),
        ({"kernel": 3, "padding": 3, "dilation": 2, "stride": 3}, (11, 13)),
        ({"kernel": 5, "padding": 2, "groups": 2}, (40, 60)),
    ],
    ids=str,
)
def test_a_convolution_stays_inside_its_buffers(
    lanes: int, size: int, window: dict[str, int], extent: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = make_conv(size, **window)
    # The input is a slice of NaN: any read outside it that counts makes the result NaN.
    around = torch.full((4, 8, *extent), NAN)
    around[1:3] = torch.randn(2, 8, *extent)
    x = around[1:3]
    assert x.is_contiguous()
    with torch.inference_mode():
        wanted = conv(x)
    layer = packed_conv(conv, target=target_of(lanes))
    walls = Walled(monkeypatch)
    with torch.inference_mode():
        got = layer(x)
    walls.assert_intact()
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert around[0].isnan().all()
    assert around[3].isnan().all()


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 16, 75])
def test_a_linear_stays_inside_its_buffers(size: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(size, out=37)
    around = torch.full((tokens + 2, 33), NAN)
    around[1:-1] = torch.randn(tokens, 33)
    x = around[1:-1]
    with torch.inference_mode():
        wanted = linear(x)
    layer = packed_linear(linear)
    walls = Walled(monkeypatch)
    with torch.inference_mode():
        got = layer(x)
    walls.assert_intact()
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_the_convolution_reads_only_its_image_at_the_end_of_memory() -> None:
    mmap = pytest.importorskip("mmap")
    ctypes = pytest.importorskip("ctypes")
    page = mmap.PAGESIZE
    conv = make_conv(kernel=1)
    count = 8 * 19 * 21
    size = -(-count * 4 // page) * page
    region = mmap.mmap(-1, size + page)
    buffer = ctypes.c_char.from_buffer(region)
    address = ctypes.addressof(buffer)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(address + size)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0  # touching this page kills the process
    x = torch.frombuffer(region, dtype=torch.float32, count=count, offset=size - count * 4).view(1, 8, 19, 21)
    x.normal_()
    assert_same(packed_conv(conv), conv, x)
    assert libc.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("relu", [False, True])
def test_nan_reaches_every_output_that_keeps_its_weight(relu: bool) -> None:
    conv = make_conv(4, 0.5, padding=1)
    x = torch.randn(1, 8, 9, 9)
    x[0, 3, 4, 4] = NAN
    touched = torch.nn.functional.conv2d(x.isnan().float(), (conv.weight != 0).float(), padding=1) > 0
    with torch.inference_mode():
        got = packed_conv(conv, relu)(x)
    assert torch.equal(got.isnan(), touched)
    assert touched.any()
    assert not touched.all()
    whole = nn.Conv2d(8, 16, 3, padding=1)
    with torch.inference_mode():
        assert torch.equal(packed_conv(whole, relu)(x).isnan(), whole(x).relu().isnan())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 20])
def test_nan_passes_a_linear(relu: bool, tokens: int) -> None:
    linear = make_linear()
    x = torch.randn(tokens, 33)
    x[-1, 5] = NAN
    with torch.inference_mode():
        got = packed_linear(linear, relu)(x)
    assert torch.equal(got[-1].isnan(), linear.weight[:, 5] != 0)
    assert not got[:-1].isnan().any()


def test_threads_share_a_layer() -> None:
    conv, linear = make_conv(padding=1), make_linear()
    layer, flat = packed_conv(conv), packed_linear(linear)
    maps = [torch.randn(1 + i % 2, 8, 5 + i, 9 + 2 * i) for i in range(8)]
    tokens = [torch.randn(1 + 5 * i, 33) for i in range(8)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            i = rng.randrange(8)
            assert_same(layer, conv, maps[i])
            assert_same(flat, linear, tokens[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


CASES: list[tuple[Callable[[], nn.Module], Callable[[], PackedLayer], Tensor]] = [
    (lambda: make_conv(padding=1), lambda: packed_conv(make_conv(padding=1)), torch.randn(2, 8, 9, 9)),
    (make_linear, lambda: packed_linear(make_linear()), torch.randn(3, 33)),
]
BOTH = pytest.mark.parametrize(("dense", "packed", "x"), CASES, ids=["conv2d", "linear"])


@BOTH
def test_a_deep_copy_lives_on_its_own(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    layer = packed()
    layer(x)
    twin = copy.deepcopy(layer)
    layer.values.fill_(NAN)
    assert_same(twin, dense(), x)


@BOTH
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_replaces_everything(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor, assign: bool
) -> None:
    module = dense()
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 1))  # as many weights at other places: all shapes stay
    other = packed_conv(module) if isinstance(module, nn.Conv2d) else packed_linear(module)  # type: ignore[arg-type]
    layer = packed()
    layer(x)  # what is remembered of this call must not survive
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_same(layer, module, x)


@BOTH
def test_a_state_dict_with_a_wild_index_is_refused(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    layer = packed()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["index"][0] = 2**30
    with pytest.raises((FileError, RuntimeError), match="out of range"):
        layer.load_state_dict(state)
    assert_same(layer, dense(), x)  # what it had is still there


@BOTH
def test_weight_and_bias_are_rebuilt(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    module, layer = dense(), packed()
    assert isinstance(module.weight, Tensor)
    assert isinstance(module.bias, Tensor)
    assert torch.equal(layer.weight, module.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, module.bias)


@BOTH
def test_training_through_a_packed_layer_is_an_error(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    with pytest.raises(AutopruneError, match="inference"):
        packed()(x.clone().requires_grad_())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("seen", [False, True])
def test_another_dtype_is_an_error(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor, dtype: torch.dtype, seen: bool
) -> None:
    layer = packed()
    if seen:
        layer(x)  # the shape alone is no reason to accept the input
    with pytest.raises(AutopruneError, match="float32"):
        layer(x.to(dtype))


@BOTH
@pytest.mark.parametrize("seen", [False, True])
def test_another_device_is_an_error(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor, seen: bool
) -> None:
    layer = packed()
    if seen:
        layer(x)
    with pytest.raises(AutopruneError, match="meta"):
        layer(x.to("meta"))


@BOTH
def test_the_default_dtype_does_not_matter(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    before, module = packed(), dense()
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(before, module, x)
        for each in (bias, None):
            module.bias = each
            after = packed_conv(module) if isinstance(module, nn.Conv2d) else packed_linear(module)  # type: ignore[arg-type]
            assert after(x).dtype == torch.float32
            assert_same(after, module, x)
        assert before.bias is not None
        assert torch.equal(before.bias, bias)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(2, 7, 9, 9), (8, 9), (1, 1, 8, 9, 9), (1, 8, 2, 9), ()], ids=str)
def test_a_wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AutopruneError, match=r"takes|smaller"):
        packed_conv(make_conv())(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 32), (34,), ()], ids=str)
def test_a_wrong_number_of_features_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AutopruneError, match="33"):
        packed_linear(make_linear())(torch.zeros(shape))


def test_an_empty_batch_gives_an_empty_output() -> None:
    assert_same(packed_conv(make_conv()), make_conv(), torch.zeros(0, 8, 9, 9))
    assert_same(packed_linear(make_linear()), make_linear(), torch.zeros(0, 33))
    assert_same(packed_linear(make_linear()), make_linear(), torch.zeros(2, 0, 33))


def test_any_memory_layout_is_read_right() -> None:
    conv, linear = make_conv(padding=1), make_linear()
    x = torch.randn(2, 8, 9, 11)
    assert_same(packed_conv(conv), conv, x.contiguous(memory_format=torch.channels_last))
    assert_same(packed_conv(conv), conv, x.transpose(2, 3))
    assert_same(packed_conv(conv), conv, torch.randn(2, 8, 18, 22)[:, :, ::2, ::2])
    assert_same(packed_linear(linear), linear, torch.randn(33, 5).t())


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_weight_of_zeros_gives_the_bias(sparsity: float) -> None:
    conv, linear = make_conv(padding=1), make_linear()
    for module in (conv, linear):
        nn.init.zeros_(module.weight)
    assert_same(packed_conv(conv), conv, torch.randn(2, 8, 9, 11))
    assert_same(packed_linear(linear, relu=True), linear, torch.randn(2, 33), relu=True)


def test_an_exported_program_computes_the_same() -> None:
    dense = nn.Sequential(
        make_conv(padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), make_linear(features=64)
    ).eval()
    conv, linear = dense[0], dense[4]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    fast = nn.Sequential(packed_conv(conv, relu=True), dense[2], dense[3], packed_linear(linear)).eval()
    x = torch.randn(2, 8, 12, 10)
    program = torch.export.export(fast, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"autoprune.packed_conv2d.default", "autoprune.packed_linear.default"} <= names
    assert_same(program.module(), dense, x)
    assert torch.equal(program.module()(x), fast(x))


def test_an_exported_convolution_takes_an_image_without_a_batch() -> None:
    conv = make_conv(padding=1)
    x = torch.randn(8, 12, 10)
    program = torch.export.export(packed_conv(conv), (x,))
    assert_same(program.module(), conv, x)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("index", lambda a: a + 8 * 9),
        ("index", lambda a: -1 - a),
        ("group_pointer", lambda a: a[::-1]),
        (
            "group_pointer",
            lambda a: np.array([0, 2**31 - 1, -(2**31), -1, a[-1]]),
        ),  # its int32 differences wrap to >= 0
        ("group_pointer", lambda a: a + 1),
        ("out_index", lambda a: np.zeros_like(a)),
        ("out_index", lambda a: a - 2),
        ("out_index", lambda a: a[:-1]),
    ],
)
def test_a_corrupt_packed_weight_is_refused(field: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    packed = pack(make_conv().weight)
    assert packed.groups == 4
    array = np.ascontiguousarray(change(getattr(packed, field)).astype(np.int32))
    with pytest.raises(FileError, match="corrupt"):
        replace(packed, **{field: array}).validate()
