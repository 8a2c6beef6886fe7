"""Plans whose layers have precisions of their own: profiled, probed, trained and scored as they will run."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.profile import profile_settings, profile_table
from autoprune.evaluation.recovery import finetune
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.evaluation.sensitivity import ANCHORS, probe_sensitivity
from autoprune.latency.timer import Protocol
from autoprune.plan import LayerPlan, Plan, curve_of
from autoprune.quantization import Grid, on_scales, weight_scales
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, quantize_
from autoprune.repack.tuning import layer_times
from autoprune.settings import TrainingSettings
from autoprune.testing import FakeClock, fake_table
from autoprune.testing.recoveries import subject_to_recover
from tests.evaluation.conftest import PATTERN, STEP_S
from tests.helpers import measured

CRITERION = Choice("magnitude")


@pytest.fixture
def by_layer(evaluator: Evaluator) -> Evaluator:
    subject = replace(evaluator.subject, precision="planned", captured={})
    table = fake_table(subject.inventory, (PATTERN,), precisions=("float32", "int8"))
    return replace(evaluator, subject=subject, table=table, recovery=NoRecovery())


@pytest.fixture
def plan(plans: list[Plan]) -> Plan:
    """Two layers in int8, the others in float32."""
    return plans[1].with_precisions({"2": "int8", "8": "int8"})


@pytest.mark.slow
def test_a_plan_is_scored_with_exactly_its_layers_in_bytes(by_layer: Evaluator, plan: Plan, plans: list[Plan]) -> None:
    masked = by_layer.masked_model(plan)
    score, fast = by_layer.scored(masked, plan)
    assert [row.name for row in fast.report if row.precision == "int8"] == ["2", "8"]
    assert score != by_layer.score(masked)
    plain, exact = by_layer.scored(masked, plans[1])
    assert {row.precision for row in exact.report} == {"float32"}
    assert plain == pytest.approx(by_layer.score(masked), abs=1e-5)


@pytest.mark.slow
def test_a_plan_that_is_not_repacked_is_scored_with_its_roundings(
    by_layer: Evaluator, plan: Plan, plans: list[Plan]
) -> None:
    predicting = replace(by_layer, timed=False)
    rounded, plain = measured(predicting(plan)), measured(predicting(plans[1]))
    assert rounded.score == pytest.approx(by_layer.scored(by_layer.masked_model(plan), plan)[0], abs=0.01)
    assert rounded.score != plain.score
    assert rounded.latency_ms < plain.latency_ms


@pytest.mark.slow
def test_the_table_has_a_curve_in_each_precision(by_layer: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer cannot be int8 here: its curve is that of float32."""
    seen: list[set[str]] = []
    last, timed = by_layer.subject.inventory.names[-1], layer_times.layer_times

    def noted(fast: ProgramModel, *given: Any) -> Any:
        seen.append({row.name for row in fast.report if row.precision == "int8"})
        fast.report = tuple(replace(row, precision="float32") if row.name == last else row for row in fast.report)
        return timed(fast, *given)

    monkeypatch.setattr("autoprune.evaluation.devices.process.layer_times", noted)
    monkeypatch.setattr("autoprune.evaluation.profile.ANCHORS", (0.5,))
    monkeypatch.setattr("autoprune.evaluation.profile.WHOLE_ANCHORS", (0.0,))
    settings = profile_settings(by_layer.subject, (PATTERN,), 1, 1)
    table = profile_table(by_layer.subject, (PATTERN,), settings, Protocol(samples=1, warmup=1), FakeClock(STEP_S))
    names = set(by_layer.subject.inventory.names)
    assert seen == [set(), set(), names, names]
    for name, layer in table.layers.items():
        assert list(layer.curves) == [curve_of(PATTERN), curve_of(PATTERN, "int8")]
        assert [point.sparsity for point in layer.curve(curve_of(PATTERN, "int8"))] == [0.0, 0.5]
        if name == last:
            assert not layer.is_int8(PATTERN)


def test_the_sensitivity_to_int8_is_the_error_that_rounding_makes(by_layer: Evaluator, tmp_path: Path) -> None:
    subject, names = by_layer.subject, by_layer.subject.inventory.names
    found = probe_sensitivity(subject, names, PATTERN, CRITERION, path=tmp_path / "curves.json")
    assert probe_sensitivity(subject, names, PATTERN, CRITERION, path=tmp_path / "curves.json") == found
    plain = probe_sensitivity(replace(subject, precision="float32"), names, PATTERN, CRITERION)
    assert plain.int8 is None
    assert (found.loss, found.error) == (plain.loss, plain.error)
    in_bytes = found.of("int8")
    assert in_bytes.anchors == (0.0, *ANCHORS)
    first = subject.dense.get_submodule(names[0])
    assert isinstance(first, nn.Conv2d)
    x = subject.task.calibration[0][0]
    grid = Grid.of_range(float(x.min()), float(x.max()))
    with torch.no_grad():
        whole = first(x)
        rounded = copy.deepcopy(first)
        rounded.weight.copy_(on_scales(first.weight, weight_scales(first.weight)))
        lost = (rounded(grid.rounded(x)) - whole).square().sum()
        share = lost / (whole - whole.mean((0, 2, 3), keepdim=True)).square().sum()
    assert in_bytes.error[names[0]][0] == pytest.approx(float(share), rel=1e-2)
    for name in names:
        assert 0.0 < in_bytes.error[name][0] < 0.01
        assert in_bytes.error[name][-1] == pytest.approx(found.error[name][-1], rel=0.1)
        assert math.isfinite(in_bytes.loss[name][-1])


def test_what_a_plan_has_in_int8_is_trained_with_its_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, quantised = subject_to_recover(), []

    def recorded(model: nn.Module, **given: Any) -> None:
        rows = quantize_(model, **given)
        quantised.append([row.layer for row in rows if row.precision == "int8"])

    monkeypatch.setattr(finetune, "quantize_", recorded)
    names = subject.inventory.names
    plan = Plan(dict.fromkeys(names, LayerPlan(0.5, Choice("group", {"size": 4}))), Choice("gradual"))
    settings = TrainingSettings(epochs=2, quantize_from=0.5)
    for each in (plan, plan.with_precisions({names[1]: "int8"})):
        finetune_(copy.deepcopy(subject.dense), each, subject, settings, precision="planned")
    assert quantised == [[names[1]]]
