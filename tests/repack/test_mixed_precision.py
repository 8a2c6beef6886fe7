"""Mixed precision: which layers stay float32, by what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Linear, Op, Recurrent, TorchOp
from autoprune.repack.graph.ops.recurrent import STATES
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.quantize import Quantised, Settings, quantisable, quantised_graph

SENSITIVE = "2"  # the layer whose weights int8 cannot hold


def chain(layers: int = 5, *, last: Op | None = None) -> Graph:
    """Linears and ReLUs; filters of the sensitive one have a weight far beyond the others, which meets zeros alone."""
    torch.manual_seed(0)
    constants, ops, value = dict[str, Tensor](), list[Op](), "x"
    for number in range(layers):
        weight = torch.randn(16, 16) / 4
        if str(number) == SENSITIVE:
            weight[:, 3] = 40.0
        elif number == int(SENSITIVE) - 1:
            weight[3] = 0.0
        constants[f"{number}.w"] = weight
        ops.append(Linear(str(number), (value,), {"weight": f"{number}.w"}, activation="relu", layer=f"layer {number}"))
        value = str(number)
    if last is not None:
        ops.append(last)
        value = last.output
    return validate(Graph((Input("x", (2, 16), "float32", (0,)),), tuple(ops), value, constants))


BATCHES = [(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]


def mixed(graph: Graph, **settings: Any) -> Quantised:
    given = {"precision": "mixed", "ranges": "min_max", **settings}
    return quantised_graph(graph, quantisable(graph), BATCHES, Settings(**given))


def floats(quantised: Quantised) -> list[str]:
    return [each.output for each in quantised.precisions if each.precision == "float32"]


def test_the_layer_that_costs_most_stays_float() -> None:
    graph = chain()
    whole = quantised_graph(graph, quantisable(graph), BATCHES)
    found = mixed(graph, least_snr_db=30.0)
    assert whole.snr_db < 25
    assert floats(found) == [SENSITIVE]
    assert found.snr_db >= 30
    row = found.precisions[int(SENSITIVE)]
    assert row.model_snr_db is not None
    assert row.model_snr_db == min(each.model_snr_db or math.inf for each in found.precisions)
    assert f"keeps {row.model_snr_db:.1f} dB" in row.why
    assert row.snr_db is not None
    assert row.scale is None
    assert found.graph.producers()[SENSITIVE] == graph.producers()[SENSITIVE]


def test_what_one_layer_costs_is_that_of_the_graph_with_it_alone_in_int8() -> None:
    graph = chain()
    found = mixed(graph)
    for row in found.precisions:
        alone = quantised_graph(graph, [row.output], BATCHES, Settings("min_max", bias_correction=False))
        exact, rounded = (reference(each, BATCHES[0]) for each in (graph, alone.graph))
        told = 10 * math.log10(float(exact.square().sum() / (rounded - exact).square().sum()))
        assert row.model_snr_db == pytest.approx(told, abs=1e-3)


@pytest.mark.parametrize(("least", "kept"), [(-math.inf, 0), (math.inf, 5)])
def test_all_or_nothing_is_quantised_where_anything_or_nothing_is_allowed(least: float, kept: int) -> None:
    found = mixed(chain(), least_snr_db=least)
    assert len(floats(found)) == kept
    if kept:
        assert found.snr_db == math.inf


def test_a_stricter_limit_leaves_no_fewer_layers_float() -> None:
    counts = [len(floats(mixed(chain(), least_snr_db=least))) for least in (10.0, 40.0, 60.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def score_by(graph: Graph) -> Callable[[Callable[..., Any]], float]:
    wanted = [reference(graph, batch).argmax(dim=1) for batch in BATCHES]

    def score(model: Callable[..., Any]) -> float:
        got = [model(*batch).argmax(dim=1) for batch in BATCHES]
        return float(torch.cat(got).eq(torch.cat(wanted)).float().mean())

    return score


def test_a_score_decides_where_one_is_given() -> None:
    graph = chain()
    score = score_by(graph)
    whole = quantised_graph(graph, quantisable(graph), BATCHES)
    assert score(lambda x: reference(whole.graph, (x,))) < 0.95
    assert SENSITIVE in floats(mixed(graph, score=score, most_drop=0.02))
    assert floats(mixed(graph, score=score, most_drop=1.0)) == []


def test_a_model_that_returns_no_floats_needs_a_score() -> None:
    last = TorchOp.of("top", "aten.argmax.default", ({"ref": "4"}, 1))
    graph = chain(last=last)
    with pytest.raises(AutopruneError, match=r"returns no floats.*take the precision 'int8'"):
        mixed(graph)

    def score(model: Callable[..., Any]) -> float:
        return float(torch.cat([model(*batch) for batch in BATCHES]).float().std())

    assert mixed(graph, score=score, most_drop=100.0).snr_db == math.inf


def recurrence(interleaved: bool = True) -> Graph:
    """A projection, a GRU of 12 units and a head."""
    torch.manual_seed(0)
    constants = {f"{name}.w": torch.randn(rows, columns) / 2 for name, rows, columns in (
        ("given", 36, 16), ("states", 36, 12), ("head", 5, 12),
    )}  # fmt: skip
    ops = [
        Linear("given", ("x",), {"weight": "given.w"}, activation=None, layer="layer given"),
        Recurrent(
            "states", ("given",), {"weight": "states.w"}, cell="gru", time_first=False, reverse=False, threshold=0.0,
            keep=0, units=None, interleaved=interleaved, layer="layer states",
        ),
        Linear("head", ("states",), {"weight": "head.w"}, activation=None, layer="layer head"),
    ]  # fmt: skip
    return validate(Graph((Input("x", (2, 6, 16), "float32", (0,)),), tuple(ops), "head", constants))


SEQUENCES = [(torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(2)]


def test_what_a_recurrent_layer_costs_is_that_of_the_graph_with_it_alone_in_int8() -> None:
    graph = recurrence()
    names = quantisable(graph)
    assert names == ("given", "states", "head")
    found = quantised_graph(graph, names, SEQUENCES, Settings("min_max", precision="mixed", least_snr_db=-math.inf))
    row = found.precisions[1]
    assert (row.precision, row.scale, row.zero_point, row.ranges) == ("int8", STATES.scale, STATES.zero_point, None)
    alone = quantised_graph(graph, ["states"], SEQUENCES, Settings("min_max"))
    assert alone.graph.producers()["states"].inputs == ("given",)
    exact, rounded = (reference(each, SEQUENCES[0]) for each in (graph, alone.graph))
    told = 10 * math.log10(float(exact.square().sum() / (rounded - exact).square().sum()))
    assert row.model_snr_db == pytest.approx(told, abs=1e-3)
    assert row.snr_db is not None
    assert 25 < row.snr_db < 60


def test_a_recurrent_layer_can_stay_float() -> None:
    graph = recurrence()
    settings = Settings("min_max", precision="mixed", least_snr_db=math.inf)
    found = quantised_graph(graph, quantisable(graph), SEQUENCES, settings)
    assert "scale" not in found.graph.producers()["states"].tensors


def test_a_recurrent_layer_without_its_gates_side_by_side_is_refused() -> None:
    graph = recurrence(interleaved=False)
    assert "states" not in quantisable(graph)
    rows = quantised_graph(graph, ["states"], SEQUENCES).precisions
    assert "gates of its units are not neighbours" in rows[0].why
