"""`repack` and `quantize_` with a precision for each layer: exactly those named are int8."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.model.weights import weight_of
from autoprune.precision import OfLayer
from autoprune.repack.outputs import noise_of
from autoprune.repack.quantize.trained import NOT_A_MODULE

LAYERS = ("0", "3", "6")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).eval()  # fmt: skip


def batches(*shape: int) -> list[Tensor]:
    return list(torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)))


def in_bytes(*names: str) -> dict[str, OfLayer]:
    return dict.fromkeys(names, "int8")


def made(rows: Mapping[str, str]) -> list[str]:
    return [name for name, precision in rows.items() if precision == "int8"]


@pytest.mark.parametrize("names", [c for n in range(4) for c in itertools.combinations(LAYERS, n)], ids=str)
def test_the_repacked_model_is_the_fake_quantised_one_in_exactly_these_layers(names: tuple[str, ...]) -> None:
    model, given = net(), batches(8, 3, 6, 6)
    with torch.no_grad():
        weight_of(model, "3")[:, ::2] = 0.0
    x, precision = given[0][:1], {"6": "float32", **in_bytes(*names)}
    fast = autoprune.repack(model, x, precision=precision, calibration=given)
    assert made({row.name: row.precision for row in fast.report}) == list(names)
    trained = copy.deepcopy(model)
    rows = autoprune.quantize_(trained, x, given, precision=precision)
    assert made({row.layer: row.precision for row in rows}) == list(names)
    assert {row.why for row in rows} == {""}
    with torch.inference_mode():
        wanted = trained(x)
        assert noise_of((fast(x),), (model(x),)) < (0.05 if names else 1e-6)
        if names:
            again = autoprune.repack(trained, x, precision="int8")
            assert noise_of((again(x),), (wanted,)) < 1e-5
            assert made({row.name: row.precision for row in again.report}) == list(names)
            assert noise_of((wanted,), (model(x),)) > 1e-5


def test_a_layer_that_cannot_be_int8_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 4, 3)).eval()
    given = batches(4, 6, 8, 8)
    fast = autoprune.repack(model, given[0][:1], precision=in_bytes("0", "2"), calibration=given)
    first, second = fast.report
    assert (first.precision, second.precision) == ("float32", "int8")
    assert "3 groups have 2 channels" in first.why
    alone = autoprune.repack(model, given[0][:1], precision=in_bytes("0"), calibration=given)
    assert {row.precision for row in alone.report} == {"float32"}


def test_a_recurrent_weight_has_a_precision_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(8, 16, batch_first=True).eval()
    given = batches(4, 5, 8)
    for names in (["weight_ih_l0"], ["weight_hh_l0"]):
        fast = autoprune.repack(model, given[0], precision=in_bytes(*names), calibration=given)
        assert made({row.name: row.precision for row in fast.report}) == names


def test_a_layer_that_no_module_computes_is_not_trained_in_int8_and_says_so() -> None:
    model, x = nn.LSTM(8, 16, batch_first=True).eval(), batches(4, 5, 8)
    rows = autoprune.quantize_(model, x[0], x, precision=in_bytes("weight_ih_l0"))
    assert {row.layer: row.why for row in rows if row.layer == "weight_ih_l0"} == {"weight_ih_l0": NOT_A_MODULE}


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ({0: "int8"}, "a layer the model does not have: 0. Did you mean '0'"),
        ({"conv": "int8"}, "a layer the model does not have: 'conv'. Allowed: 0, 3, 6"),
        ({"0": "int4"}, "layer '0': its precision is one of float32, int8, not 'int4'"),
        ({"0": "mixed"}, "layer '0': its precision is one of float32, int8, not 'mixed'"),
        (["0"], "or maps layers to theirs"),
    ],
    ids=str,
)
def test_what_is_no_precision_of_layers_is_refused(precision: dict[str, OfLayer], said: str) -> None:
    model, given = net(), batches(8, 3, 6, 6)
    with pytest.raises(AutopruneError, match=said):
        autoprune.repack(model, given[0][:1], precision=precision, calibration=given)


def test_a_shared_layer_is_named_by_its_first_name() -> None:
    shared = nn.Linear(8, 8)
    model, given = nn.Sequential(shared, nn.ReLU(), shared).eval(), batches(4, 8)
    with pytest.raises(AutopruneError, match="It is '0', shared"):
        autoprune.repack(model, given[0], precision=in_bytes("2"), calibration=given)
    fast = autoprune.repack(model, given[0], precision=in_bytes("0"), calibration=given)
    assert [row.precision for row in fast.report] == ["int8"]


def test_a_fake_quantised_model_says_itself_which_layers_are_int8() -> None:
    model, given = net(), batches(8, 3, 6, 6)
    autoprune.quantize_(model, given[0][:1], given)
    with pytest.raises(AutopruneError, match="says already which of its layers are int8"):
        autoprune.repack(model, given[0][:1], precision=in_bytes("0"))
