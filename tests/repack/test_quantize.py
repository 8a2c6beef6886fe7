"""Calibration and quantised graphs, judged by the reference: which values lie on grids, and how well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.quantization import METHODS, Grid
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import (
    Add,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    LayerNorm,
    Linear,
    MaxPool2d,
    Op,
    Quantize,
    Reshape,
    Scalar,
    TorchOp,
)
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.schema import from_json, to_json, validate
from autoprune.repack.quantize import Quantised, Settings, quantisable, quantised_graph
from autoprune.repack.quantize.batches import fitting_batches, observe
from autoprune.repack.weights.packed import pack_rows

IMAGE = Input("x", (2, 3, 8, 8), "float32", (0,))
TOKENS = Input("x", (2, 5, 16), "float32", (0,))


class Built:
    """A graph that is built an operation at a time, with random weights."""

    def __init__(self, *inputs: Input) -> None:
        torch.manual_seed(0)
        self.inputs, self.ops, self.constants = inputs, list[Op](), dict[str, Tensor]()

    def conv(
        self, name: str, x: str, filters: int, channels: int, *, kernel: int = 3, groups: int = 1, relu: bool = True,
        residual: str | None = None, bias: bool = True,
    ) -> Built:  # fmt: skip
        self.constants[f"{name}.w"] = torch.randn(filters, channels // groups, kernel, kernel) / kernel
        self.constants[f"{name}.b"] = torch.randn(filters) / 4
        tensors = {"weight": f"{name}.w"} | ({"bias": f"{name}.b"} if bias else {})
        window = {"stride": (1, 1), "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": groups}
        inputs = (x,) if residual is None else (x, residual)
        activation = "relu" if relu else None
        return self.add(Conv2d(name, inputs, tensors, **window, activation=activation, layer=f"layer.{name}"))  # type: ignore[arg-type]

    def linear(self, name: str, x: str, filters: int, features: int, residual: str | None = None) -> Built:
        self.constants[f"{name}.w"] = torch.randn(filters, features) / features**0.5
        self.constants[f"{name}.b"] = torch.randn(filters)
        inputs = (x,) if residual is None else (x, residual)
        return self.add(Linear(name, inputs, {"weight": f"{name}.w", "bias": f"{name}.b"}, activation=None))

    def add(self, *ops: Op) -> Built:
        self.ops += ops
        return self

    def returning(self, outputs: Any) -> Graph:
        return validate(Graph(self.inputs, tuple(self.ops), outputs, self.constants))


def max_pool(name: str, x: str) -> Op:
    return MaxPool2d(name, (x,), kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1))


def joined(name: str, *values: str) -> Op:
    return TorchOp.of(name, "aten.cat.default", ([{"ref": value} for value in values], 1))


def images(*counts: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, 3, 8, 8, generator=generator),) for count in counts]


def quantised(graph: Graph, batches: Sequence[tuple[Tensor, ...]] | None = None, **settings: Any) -> Quantised:
    return quantised_graph(graph, quantisable(graph), batches or images(4, 4), Settings(**settings))


def behind(graph: Graph) -> list[str]:
    """The values that are moved onto grids."""
    return [op.inputs[0] for op in graph.ops if isinstance(op, Quantize)]


def reads(graph: Graph, output: str) -> tuple[str, ...]:
    """What an operation reads; rounded values as ``q(name)``."""
    producers = graph.producers()
    named = {op.output: f"q({op.inputs[0]})" for op in graph.ops if isinstance(op, Quantize)}
    return tuple(named.get(name, name) for name in producers[output].inputs)


def snr_db(graph: Graph, other: Graph, batch: tuple[Tensor, ...]) -> float:
    exact, rounded = reference(graph, batch), reference(other, batch)
    return 10 * math.log10(float(exact.square().sum() / (rounded - exact).square().sum()))


def residual_net() -> Graph:
    built = Built(IMAGE).conv("a", "x", 8, 3).conv("b", "a", 8, 8).conv("c", "b", 8, 8, residual="a")
    built.conv("short", "c", 16, 8, kernel=1, relu=False).conv("d", "c", 16, 8).conv("e", "d", 16, 16, residual="short")
    return built.add(GlobalAvgPool("mean", ("e",), keepdim=False)).linear("fc", "mean", 5, 16).returning("fc")


def test_residuals_and_pools_of_maps_read_bytes() -> None:
    graph = residual_net()
    found = quantised(graph)
    assert behind(found.graph) == ["x", "a", "b", "c", "short", "d", "e", "mean"]
    assert reads(found.graph, "c") == ("q(b)", "q(a)")
    assert reads(found.graph, "e") == ("q(d)", "q(short)")
    assert reads(found.graph, "mean") == ("q(e)",)
    assert [each.precision for each in found.precisions] == ["int8"] * 7
    assert [each.layer for each in found.precisions][:2] == ["layer.a", "layer.b"]
    assert found.precisions[-1].layer == "fc"
    assert min(each.snr_db or 0 for each in found.precisions) > 30
    assert snr_db(graph, found.graph, images(3, seed=9)[0]) > 30


def test_a_quantised_graph_goes_into_a_file_and_back() -> None:
    found = quantised(residual_net())
    again = from_json(to_json(found.graph), found.graph.constants)
    assert torch.equal(reference(again, images(2)[0]), reference(found.graph, images(2)[0]))


def test_weights_are_multiples_of_the_scales_that_are_returned() -> None:
    found = quantised(residual_net())
    for op in found.graph.ops:
        if isinstance(op, (Conv2d, Linear)):
            weight, scales = found.graph.constants[op.tensors["weight"]], found.scales[op.output]
            packed = pack_rows(weight, 1, np.arange(len(weight), dtype=np.int32).reshape(-1, 1), scales).validate()
            assert torch.equal(packed.unpack(), weight)


def test_the_grid_moves_up_through_maxima_and_reshapes() -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3).add(max_pool("pool", "a"), Reshape("flat", ("pool",), shape=(-1, 128)))
    graph = built.linear("fc", "flat", 5, 128).returning("fc")
    found = quantised(graph)
    assert behind(found.graph) == ["x", "a"]
    assert reads(found.graph, "pool") == ("q(a)",)
    grids = {op.inputs[0]: op.grid for op in found.graph.ops if isinstance(op, Quantize)}
    values = {"x": images(2)[0][0]}
    after = grids["a"].rounded(torch.nn.functional.max_pool2d(values["x"], 2))
    assert torch.equal(torch.nn.functional.max_pool2d(grids["a"].rounded(values["x"]), 2), after)


def test_the_grid_stays_below_a_maximum_that_others_read_as_floats() -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3).add(max_pool("pool", "a")).conv("b", "pool", 8, 8)
    built.add(TorchOp.of("wave", "aten.sin.default", ({"ref": "pool"},)), Add("sum", ("wave", "b"), activation=None))
    found = quantised(built.returning("sum"))
    assert behind(found.graph) == ["x", "pool"]
    assert reads(found.graph, "pool") == ("a",)
    assert reads(found.graph, "wave") == ("pool",)
    assert reads(found.graph, "b") == ("q(pool)",)


def test_what_is_returned_is_never_rounded() -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3).conv("b", "a", 8, 8).conv("c", "b", 8, 8, residual="a")
    found = quantised(built.returning({"tuple": ["a", "c"]}))
    assert behind(found.graph) == ["x", "a", "b"]
    assert reads(found.graph, "c") == ("q(b)", "a")
    batch = images(2)[0]
    returned = reference(found.graph, batch)[0]
    assert len(returned.unique()) > 256


def test_parts_of_a_concatenation_share_its_grid_unless_others_read_them() -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3).conv("b", "a", 8, 8).conv("c", "b", 4, 8)
    built.add(joined("both", "b", "c"), AvgPool2d("mean", ("both",), kernel=(2, 2), stride=(2, 2), padding=(0, 0), count_include_pad=True))  # fmt: skip  # noqa: E501
    found = quantised(built.conv("d", "mean", 8, 12).returning("d"))
    assert behind(found.graph) == ["x", "a", "b", "c", "both", "mean"]
    assert reads(found.graph, "both") == ("q(b)", "q(c)")
    grids = {op.inputs[0]: op.grid for op in found.graph.ops if isinstance(op, Quantize)}
    assert grids["c"] == grids["both"]
    assert grids["b"] != grids["both"]
    assert grids["mean"] != grids["both"]


def test_maps_that_no_int8_layer_follows_stay_floats() -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3).conv("b", "x", 8, 3).add(Add("sum", ("a", "b"), activation="relu"))
    found = quantised(built.add(GlobalAvgPool("mean", ("sum",), keepdim=False)).returning("mean"))
    assert behind(found.graph) == ["x"]


def test_outputs_that_are_infinite_do_not_hide_the_error_of_the_others() -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3)
    built.constants["mask"] = torch.zeros(8, 8).masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
    graph = built.add(TorchOp.of("masked", "aten.add.Tensor", ({"ref": "a"}, {"ref": "mask"}))).returning("masked")
    assert quantised(graph, ranges="min_max").snr_db == pytest.approx(40, abs=5)


def test_the_residual_stream_of_tokens_stays_float() -> None:
    built = Built(TOKENS).add(LayerNorm("norm", ("x",), size=16, eps=1e-5)).linear("up", "norm", 32, 16)
    built.linear("down", "up", 16, 32, residual="x").linear("head", "down", 4, 16)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 5, 16, generator=generator),) for _ in range(3)]
    found = quantised(built.returning("head"), batches)
    assert behind(found.graph) == ["norm", "up", "down"]
    assert reads(found.graph, "down") == ("q(up)", "x")
    assert snr_db(built.returning("head"), found.graph, batches[0]) > 30


def test_the_grid_does_not_move_up_through_a_reshape_that_joins_heads() -> None:
    built = Built(TOKENS).add(
        Reshape("heads", ("x",), shape=(-1, 5, 4, 4)), TorchOp.of("wave", "aten.sin.default", ({"ref": "heads"},)),
        Reshape("tokens", ("wave",), shape=(-1, 5, 16)), Reshape("flat", ("tokens",), shape=(-1, 16)),
    )  # fmt: skip
    found = quantised(built.linear("proj", "flat", 8, 16).returning("proj"), [(torch.randn(2, 5, 16),)])
    assert behind(found.graph) == ["tokens"]
    assert reads(found.graph, "flat") == ("q(tokens)",)


def test_tokens_of_four_axes_are_no_maps() -> None:
    windows = Input("x", (2, 4, 4, 16), "float32", (0,))
    built = Built(windows).linear("up", "x", 16, 16).linear("down", "up", 16, 16, residual="x")
    found = quantised(built.linear("head", "down", 4, 16).returning("head"), [(torch.randn(2, 4, 4, 16),)])
    assert reads(found.graph, "down") == ("q(up)", "x")


def test_extents_are_read_of_the_rounded_value() -> None:
    built = (
        Built(IMAGE)
        .conv("a", "x", 8, 3)
        .add(Scalar.of("samples", "size", ("a", 0)), Reshape("flat", ("a",), shape=({"ref": "samples"}, 512)))
    )
    found = quantised(built.linear("fc", "flat", 3, 512).returning("fc"))
    assert behind(found.graph) == ["x", "a"]
    assert reads(found.graph, "samples") == ("q(a)",)


@pytest.mark.parametrize(
    ("filters", "groups", "precision"), [(8, 8, "int8"), (8, 2, "int8"), (8, 4, "float32"), (16, 8, "float32")]
)
def test_groups_are_int8_where_whole_lanes_are_theirs(filters: int, groups: int, precision: str) -> None:
    built = Built(IMAGE).conv("a", "x", 8, 3).conv("b", "a", filters, 8, groups=groups)
    graph = built.returning("b")
    found = quantised_graph(graph, ["a", "b"], images(2, 2))
    assert [each.precision for each in found.precisions] == ["int8", precision]
    assert ("groups" in found.precisions[1].why) == (precision == "float32")
    assert ("q(a)" in reads(found.graph, "b")) == (precision == "int8")


def test_layers_that_were_not_asked_for_stay_as_they_are() -> None:
    graph = residual_net()
    found = quantised_graph(graph, ["b"], images(2))
    assert behind(found.graph) == ["a"]
    assert reads(found.graph, "c") == ("b", "a")
    assert list(found.scales) == ["b"]
    assert [each.layer for each in found.precisions] == ["layer.b"]


def test_sums_that_could_exceed_32_bits_stay_float() -> None:
    features = 2**31 // (127 * 255) + 2
    built = Built(Input("x", (1, features), "float32", (0,))).linear("wide", "x", 2, features)
    built.constants["wide.w"] = torch.ones(2, features)
    found = quantised(built.returning("wide"), [(torch.rand(2, features),)])
    assert [each.precision for each in found.precisions] == ["float32"]
    assert "32 bits" in found.precisions[0].why
    assert behind(found.graph) == []


@pytest.mark.parametrize("method", [*METHODS, "best"])
def test_every_range_method_gives_a_close_graph(method: str) -> None:
    found = quantised(residual_net(), ranges=method)
    assert {each.ranges for each in found.precisions} <= ({method} if method != "best" else set(METHODS))
    assert found.snr_db > 20


def test_the_best_ranges_make_no_larger_errors_than_any_one_method() -> None:
    graph = Built(IMAGE).conv("a", "x", 8, 3).conv("b", "a", 8, 8).conv("c", "a", 8, 8).returning({"list": ["b", "c"]})
    batches = images(4, 4)
    batches[0][0][0, 0, 0, 0] = 40.0

    def noise(method: str) -> float:  # of what reads x, whose range is in question
        row = quantised(graph, batches, ranges=method, bias_correction=False).precisions[0]
        assert row.snr_db is not None
        return row.snr_db

    assert noise("best") >= max(noise(method) for method in METHODS) - 0.3
    assert noise("best") > noise("percentile_99.9") + 3


def test_bias_correction_takes_out_the_mean_error_that_samples_agree_on() -> None:
    graph = Built(IMAGE).conv("a", "x", 8, 3, kernel=1, bias=False, relu=False).returning("a")
    near_two = [(2 + x / 20,) for (x,) in images(4, 4)]  # so that what weights are rounded by adds up
    plain, corrected = quantised(graph, near_two, bias_correction=False), quantised(graph, near_two)
    fresh = (2 + images(64, seed=5)[0][0] / 20,)
    assert snr_db(graph, corrected.graph, fresh) > snr_db(graph, plain.graph, fresh) + 3
    assert list(plain.graph.producers()["a"].tensors) == ["weight", "scale"]


def test_one_sample_is_not_enough_for_bias_correction() -> None:
    graph = Built(IMAGE).conv("a", "x", 8, 3).returning("a")
    assert quantised(graph, images(1)).graph.constants["a.b"] is graph.constants["a.b"]
    assert "a.b" not in quantised(graph, images(8)).graph.constants


def test_bias_correction_never_raises_the_error_of_the_outputs() -> None:
    graph = residual_net()
    for batches in (images(2), images(3, 2), images(8, 8)):
        plain = quantised(graph, batches, ranges="min_max", bias_correction=False)
        assert quantised(graph, batches, ranges="min_max").snr_db >= plain.snr_db


def test_biases_are_corrected_for_what_the_layers_before_give() -> None:
    """In the mean, what every int8 layer gives once it is corrected is what the float one gives."""
    built = Built(IMAGE).conv("a", "x", 8, 3, relu=False).conv("b", "a", 8, 8, relu=False, bias=False)
    graph = built.conv("c", "b", 8, 8, relu=False).returning("c")
    batches = [(1 + x / 4,) for (x,) in images(16, 16)]
    plain, corrected = (quantised(graph, batches, bias_correction=on).graph for on in (False, True))
    for name in ("a", "b", "c"):
        exact, before, after = (
            torch.cat([reference(Graph(each.inputs, each.ops, name, each.constants), batch) for batch in batches])
            for each in (graph, plain, corrected)
        )
        left, added = (after - exact).mean((0, 2, 3)), (before - exact).mean((0, 2, 3))
        assert float(left.norm()) < 0.3 * float(added.norm())


def test_filters_of_zeros_stay_zero() -> None:
    graph = residual_net()
    graph.constants["d.w"][3] = 0.0
    found = quantised(graph)
    assert found.scales["d"][3] == 1
    weight = found.graph.constants[found.graph.producers()["d"].tensors["weight"]]
    assert not weight[3].any()
    assert weight[2].any()


@pytest.mark.parametrize("constant", [0.0, 0.7, -2.0])
def test_constant_data_is_told_and_gives_right_results(constant: float) -> None:
    graph = residual_net()
    batches = [(torch.full((2, 3, 8, 8), constant),)]
    found = quantised(graph, batches)
    assert f"{constant:g}: give data that varies" in found.precisions[0].why
    got, wanted = reference(found.graph, batches[0]), reference(graph, batches[0])
    assert float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_bad_calibration_data_is_told_by_value_and_batch() -> None:
    graph = residual_net()
    for bad in (math.nan, math.inf):
        batches = images(2, 2)
        batches[1][0][1, 2, 3, 4] = bad
        with pytest.raises(AutopruneError, match=r"'x' is NaN or infinite somewhere in calibration batch 2"):
            quantised(graph, batches)
    with pytest.raises(AutopruneError, match="needs calibration data"):
        quantised_graph(graph, ["a"], [])
    for wrong, match in (
        (torch.zeros(2, 3, 8, 9), r"batch 1 does not fit: .*\(2, 3, 8, 8\) \(any batch size\), not \(2, 3, 8, 9\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "'x' is float32, not float64"),
        (torch.zeros(0, 3, 8, 8), "without a sample"),
    ):
        with pytest.raises(AutopruneError, match=match):
            quantised(graph, [(wrong,)])
    with pytest.raises(AutopruneError, match="takes 1 inputs, not 2"):
        quantised(graph, [(torch.zeros(2, 3, 8, 8), torch.zeros(1))])


def test_batches_are_cut_for_a_graph_of_one_batch_size() -> None:
    fixed = Built(Input("x", (2, 3, 8, 8), "float32")).conv("a", "x", 4, 3).returning("a")
    (batch,) = images(5)
    pieces = fitting_batches(fixed, [batch])
    assert [len(piece[0]) for piece in pieces] == [2, 2, 2]
    assert torch.equal(pieces[2][0], batch[0][3:])
    with pytest.raises(AutopruneError, match=r"not \(1, 3, 8, 8\)"):
        fitting_batches(fixed, images(1))
    free = residual_net()
    assert [len(piece[0]) for piece in fitting_batches(free, images(5, 1))] == [5, 1]


def test_observers_see_every_value_asked_for() -> None:
    graph, batches = residual_net(), images(3, 2)
    names = ["x", *(op.output for op in graph.ops)]
    observers = observe(graph, batches, names)
    flat = Graph(graph.inputs, graph.ops, {"list": names}, graph.constants)
    values = [torch.cat(parts) for parts in zip(*(reference(flat, batch) for batch in batches), strict=True)]
    for name, value in zip(names, values, strict=True):
        assert observers[name].count == value.numel()
        assert (observers[name].low, observers[name].high) == (float(value.min()), float(value.max()))


def test_layers_that_the_graph_does_not_have_are_named() -> None:
    with pytest.raises(AutopruneError, match="no layers whose outputs are mean, nowhere"):
        quantised_graph(residual_net(), ["a", "nowhere", "mean"], images(2))


def test_settings_are_checked() -> None:
    with pytest.raises(AutopruneError, match=r"no range method 'min-max'.*min_max"):
        Settings(ranges="min-max")
    with pytest.raises(AutopruneError, match="no precision 'int4'"):
        Settings(precision="int4")  # type: ignore[arg-type]
    with pytest.raises(AutopruneError, match="drop of -1"):
        Settings(most_drop=-1)


def test_grids_of_relu_outputs_begin_at_zero() -> None:
    found = quantised(residual_net())
    grids = {op.inputs[0]: op.grid for op in found.graph.ops if isinstance(op, Quantize)}
    assert {name for name, grid in grids.items() if grid.zero_point == 0} == {"a", "b", "c", "d", "e", "mean"}
    assert all(isinstance(grid, Grid) for grid in grids.values())
