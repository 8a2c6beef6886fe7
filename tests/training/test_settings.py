"""Training settings: ranges, names, JSON, and the learning rate they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import ConfigError
from autoprune.settings import OPTIMIZERS, SCHEDULES, TrainingSettings, learning_rate, make_optimizer


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@given(total=st.integers(1, 500), warmup=st.floats(0.0, 0.99), peak=st.floats(1e-5, 10.0))
def test_the_rate_rises_to_its_peak_then_never_rises(schedule: str, total: int, warmup: float, peak: float) -> None:
    settings = TrainingSettings(learning_rate=peak, schedule=schedule, warmup=warmup)
    rates = [learning_rate(settings, step, total) for step in range(1, total + 1)]
    warm = round(warmup * total)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert max(rates) == pytest.approx(peak)


def test_cosine_by_hand() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup=0.2)
    assert [learning_rate(settings, step, 10) for step in (1, 2, 3, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    constant = TrainingSettings(learning_rate=1.0, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(1, 11)} == {1.0}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_biases_and_norms_do_not_decay(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer(parameters, TrainingSettings(optimizer=name, weight_decay=0.1, learning_rate=0.1))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (parameters[0] < 1).all()
    assert torch.equal(parameters[1], torch.ones(2))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"epochs": 0}, "'epochs' must be an integer >= 1, not 0"),
        ({"epochs": 2.5}, "'epochs' must be an integer >= 1, not 2.5"),
        ({"epochs": True}, "'epochs' must be an integer >= 1, not True"),
        ({"learning_rate": float("nan")}, "'learning_rate' must be a number > 0, not nan"),
        ({"momentum": 1.0}, "'momentum' must be in [0, 1), not 1.0"),
        ({"weight_decay": -1}, "'weight_decay' must be a number >= 0, not -1"),
        ({"distillation_weight": 1.1}, "'distillation_weight' must be in [0, 1], not 1.1"),
        ({"teacher_weights": "means"}, "unknown teacher_weights 'means'. Did you mean 'mean'?"),
        ({"ema_teacher": 1.0}, "'ema_teacher' must be in [0, 1) or nothing, not 1.0"),
        ({"max_steps": 0}, "'max_steps' must be an integer >= 1 or nothing, not 0"),
        ({"clip_norm": "1"}, "'clip_norm' must be a number > 0 or nothing, not '1'"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'. Did you mean 'sgd'? Allowed: adamw, sgd."),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'? Allowed: constant, cosine."),
        ({"learning_rte": 1}, "unknown training setting 'learning_rte'. Did you mean 'learning_rate'?"),
    ],
)
def test_refuses(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingSettings.from_json(args)
    assert said in str(caught.value)


def test_survives_json() -> None:
    settings = TrainingSettings(epochs=3, clip_norm=1.0, max_steps=7, ema_teacher=0.9)
    assert TrainingSettings.from_json(settings.to_json()) == settings
