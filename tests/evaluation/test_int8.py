"""Plans evaluated in int8: the model that is timed and scored is the one that is deployed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.profile import profile_settings, profile_table
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.latency.timer import Protocol
from autoprune.plan import Plan
from autoprune.repack import CaptureError, ProgramModel
from autoprune.repack.outputs import noise_of
from autoprune.testing import FakeClock
from tests.evaluation.conftest import PATTERN, STEP_S


@pytest.fixture
def in_bytes(evaluator: Evaluator) -> Evaluator:
    return replace(evaluator, subject=replace(evaluator.subject, precision="int8", captured={}), recovery=NoRecovery())


@pytest.mark.slow
def test_a_plan_is_scored_as_the_program_of_bytes_that_it_becomes(in_bytes: Evaluator, plans: list[Plan]) -> None:
    masked = in_bytes.masked_model(plans[1])
    score, fast = in_bytes.scored(masked, plans[1])
    assert {row.precision for row in fast.report} == {"int8"}
    assert score == in_bytes.score(fast) != in_bytes.score(masked)
    x = in_bytes.subject.task.calibration[0][0]
    with torch.inference_mode():
        noise = noise_of((fast(x),), (masked(x),))
    assert 0.0 < noise < 0.1


@pytest.mark.slow
def test_the_layers_of_a_table_are_timed_in_bytes(in_bytes: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    timed = ProgramModel.bound_call

    def noted(self: ProgramModel, *inputs: Tensor) -> object:
        seen.append({row.precision for row in self.report})
        return timed(self, *inputs)

    monkeypatch.setattr(ProgramModel, "bound_call", noted)
    settings = profile_settings(in_bytes.subject, (PATTERN,), 1, 1)
    plain = profile_settings(replace(in_bytes.subject, precision="float32"), (PATTERN,), 1, 1)
    assert {key for key in settings if settings[key] != plain[key]} == {"precision"}, "another table in the cache"
    monkeypatch.setattr("autoprune.evaluation.profile.ANCHORS", (0.5,))
    table = profile_table(in_bytes.subject, (PATTERN,), settings, Protocol(samples=1, warmup=1), FakeClock(STEP_S))
    assert set(table.layers) == set(in_bytes.subject.inventory.names)
    assert seen
    assert all(precisions == {"int8"} for precisions in seen)


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_a_model_that_is_no_program_is_refused(evaluator: Evaluator) -> None:
    subject = replace(evaluator.subject, dense=Undecided(), precision="int8", captured={})
    with pytest.raises(CaptureError, match="precision 'int8' is for whole programs, and this model is none"):
        subject.graph(1)
    assert replace(subject, precision="float32").graph(1) is None
