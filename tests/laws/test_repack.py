"""Laws of repacking: for any layer, pattern and backend, the packed layer computes what the masked one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import BACKENDS, LayerForm, lower_layer, pack
from autoprune.testing import check_backend
from autoprune.testing.backends import check_lowered

GROUP_SIZES = (1, 2, 4, 8, 16)
ROWS = [pytest.param(backend, pattern, id=f"{backend}-{pattern}") for backend in BACKENDS for pattern in PATTERNS]
FEW = settings(max_examples=15)


def masked(module: nn.Module, choice: Choice, sparsity: float, groups: int = 1) -> nn.Module:
    """Prunes by magnitude, in place."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(PATTERNS.create(choice).mask(weight.abs(), sparsity, groups))
    return module.eval()


def arguments(draw: st.DrawFn, pattern: str) -> Choice:
    if pattern == "group":
        return Choice("group", {"size": draw(st.sampled_from([*GROUP_SIZES, 3]))})
    if pattern == "n:m":
        n, m = draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]))
        return Choice("n:m", {"n": n, "m": m})
    if pattern == "block":
        return Choice("block", {key: draw(st.sampled_from([*GROUP_SIZES, 3])) for key in ("rows", "columns")})
    return Choice(pattern)


def sparsities() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.floats(0.0, 0.99))


@st.composite
def convolutions(draw: st.DrawFn, pattern: str) -> tuple[nn.Conv2d, Tensor]:
    """A pruned convolution and an input, at times without a batch dimension."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 20))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 5), (2, 3)]))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = draw(st.one_of(st.just((1, 1)), pairs)), draw(st.one_of(st.just((1, 1)), pairs))
    padding = draw(st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    high, wide = (extent + draw(st.integers(0, 24)) for extent in least)
    bias = draw(st.booleans())
    conv = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, bias)
    masked(conv, arguments(draw, pattern), draw(sparsities()), groups)
    batch = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    return conv, torch.randn(*batch, channels, high, wide)


@st.composite
def linears(draw: st.DrawFn, pattern: str) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    linear = nn.Linear(draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.booleans()))
    masked(linear, arguments(draw, pattern), draw(sparsities()))
    leading = draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(1, 40)),
            st.tuples(st.integers(1, 5), st.integers(1, 8)),
        )
    )
    return linear, torch.randn(*leading, linear.in_features)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_backend_keeps_the_laws(backend: str) -> None:
    check_backend(BACKENDS.create(Choice(backend)), examples=10)


def check(backend: str, module: nn.Conv2d | nn.Linear, x: Tensor, relu: bool) -> None:
    check_lowered(BACKENDS.create(Choice(backend)), LayerForm(module, relu), x)


@pytest.mark.parametrize(("backend", "pattern"), ROWS)
@FEW
@given(data=st.data(), relu=st.booleans())
def test_a_lowered_convolution_equals_the_masked_one(
    backend: str, pattern: str, data: st.DataObject, relu: bool
) -> None:
    check(backend, *data.draw(convolutions(pattern)), relu)


@pytest.mark.parametrize(("backend", "pattern"), ROWS)
@FEW
@given(data=st.data(), relu=st.booleans())
def test_a_lowered_linear_equals_the_masked_one(backend: str, pattern: str, data: st.DataObject, relu: bool) -> None:
    check(backend, *data.draw(linears(pattern)), relu)


@pytest.mark.parametrize("pattern", list(PATTERNS))
@given(data=st.data())
def test_packing_loses_nothing_and_is_valid(pattern: str, data: st.DataObject) -> None:
    conv, _ = data.draw(convolutions(pattern))
    packed = pack(conv.weight, conv.groups)
    assert packed.validate() is packed
    assert torch.equal(packed.unpack(), conv.weight)
    linear, _ = data.draw(linears(pattern))
    assert torch.equal(pack(linear.weight).validate().unpack(), linear.weight)


@pytest.mark.parametrize("size", GROUP_SIZES)
@given(data=st.data(), sparsity=sparsities())
def test_a_groups_structure_is_never_missed(size: int, data: st.DataObject, sparsity: float) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    groups, filters = data.draw(st.sampled_from([1, 2])), size * data.draw(st.integers(1, 3))
    conv = nn.Conv2d(groups * data.draw(st.integers(1, 6)), groups * filters, 3, groups=groups)
    masked(conv, Choice("group", {"size": size}), sparsity, groups)
    packed = pack(conv.weight, groups)
    assert packed.group_size >= size  # larger where neighbouring groups happen to agree, as without zeros
    assert packed.values.all() or packed.group_size > size


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_packed_group_size_is_the_patterns(size: int, sparsity: float, groups: int) -> None:
    torch.manual_seed(size)
    conv = nn.Conv2d(32 * groups, 32 * groups, 3, groups=groups)
    masked(conv, Choice("group", {"size": size}), sparsity, groups)
    packed = pack(conv.weight, groups)
    assert packed.group_size == size
    assert packed.values.size == torch.count_nonzero(conv.weight)  # nothing is stored that is not kept


@pytest.mark.parametrize("rows", [4, 8, 16])
@pytest.mark.parametrize("columns", [1, 8])
def test_the_rows_of_a_block_are_packed_together(rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    conv = nn.Conv2d(32, 64, 3)
    masked(conv, Choice("block", {"rows": rows, "columns": columns}), 0.75)
    packed = pack(conv.weight)
    assert packed.group_size >= rows
    assert packed.values.size == torch.count_nonzero(conv.weight)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_a_layer_without_weights_gives_its_bias(backend: str, kind: str) -> None:
    module: nn.Conv2d | nn.Linear = nn.Conv2d(3, 5, 3, padding=1) if kind == "conv2d" else nn.Linear(7, 5)
    nn.init.zeros_(module.weight)
    x = torch.randn(2, 3, 6, 7) if kind == "conv2d" else torch.randn(2, 7)
    check(backend, module.eval(), x, False)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(
    "odd", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}, {"padding": "valid"}], ids=str
)
def test_an_odd_padding_is_computed_or_refused(backend: str, odd: dict[str, Any]) -> None:
    conv = masked(nn.Conv2d(4, 8, (2, 4), **odd), Choice("group", {"size": 4}), 0.5)
    assert isinstance(conv, nn.Conv2d)
    check(backend, conv, torch.randn(2, 4, 9, 11), False)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("relu", [False, True])
def test_an_empty_batch_gives_an_empty_output(backend: str, channels: int, relu: bool) -> None:
    conv, linear = nn.Conv2d(channels, 8, 3), nn.Linear(channels, 8)
    for module, shape in ((conv, (0, channels, 7, 9)), (linear, (0, channels)), (linear, (2, 0, channels))):
        lowered = lower_layer(masked(module, Choice("unstructured"), 0.1), relu)[backend]
        with torch.inference_mode():
            assert lowered(torch.zeros(shape)).shape == module(torch.zeros(shape)).shape


def test_lower_layer_holds_every_backend_that_supports_the_layer() -> None:
    whole = nn.Conv2d(4, 8, 3).eval()
    grouped = nn.Conv2d(4, 8, 3, groups=2).eval()
    assert list(lower_layer(whole)) == list(BACKENDS)
    form = LayerForm(grouped)
    assert set(lower_layer(grouped)) == {name for name in BACKENDS if BACKENDS.get(name)().supports(form).ok}
