"""A trial and its line in ``trials.jsonl``."""

from __future__ import annotations

import json

import pytest

from autoprune.agents.halving import best_plans
from autoprune.agents.harness import SearchResult
from autoprune.envs.trial import Reward, Trial
from autoprune.errors import ConfigError, NumericalError
from autoprune.evaluation.measurement import Failure, Measurement
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice

PLAN = Plan({"fc": LayerPlan(0.5, Choice("group", {"size": 8}))})
PLAN_LINE = (
    '{"layers": {"fc": {"criterion": {"args": {}, "name": "magnitude"}, "pattern": {"args": {"size": 8}, "name": '
    '"group"}, "sparsity": 0.5}}, "settings": {}, "training": {"args": {}, "name": "one_shot"}, "version": 1}'
)
MEASURED = Trial(PLAN, Measurement(0.75, 1.5, 2.0), -1.25, Reward(-1.0, -0.25))
FAILED = Trial(PLAN, Failure("it diverged"), -11.0, Reward(-11.0, -0.0))
TRAINED = Trial(PLAN, Measurement(0.75, 1.5, 2.0), -1.25, Reward(-1.0, -0.25), fidelity=40)
FIGURES = '"latency_ms": 1.5, "plan": ' + PLAN_LINE + ', "reward": -1.25, "score": 0.75, "speedup": 2.0'
LINES = {
    "{" + FIGURES + ', "terms": {"score": -1.0, "speed": -0.25}}': MEASURED,
    '{"failed": "it diverged", "plan": ' + PLAN_LINE + ', "reward": -11.0, "terms": {"score": -11.0, "speed": -0.0}}': (
        FAILED
    ),
    '{"fidelity": 40, ' + FIGURES + ', "terms": {"score": -1.0, "speed": -0.25}}': TRAINED,
}


@pytest.mark.parametrize(("line", "trial"), LINES.items())
def test_the_line_of_a_trial_is_what_it_always_was_and_is_read_back(line: str, trial: Trial) -> None:
    assert json.dumps(trial.to_json(), sort_keys=True) == line
    assert Trial.from_json(json.loads(line)) == trial


def test_a_failed_trial_has_no_measurement() -> None:
    assert MEASURED.measurement.speedup == 2.0
    assert not MEASURED.failed
    assert FAILED.failed
    with pytest.raises(NumericalError, match="it diverged"):
        _ = FAILED.measurement


def test_of_equal_rewards_the_better_score_is_chosen() -> None:
    better = Trial(PLAN, Measurement(0.76, 1.5, 2.0), -1.25, Reward(-1.0, -0.25))
    failed = Trial(PLAN, Failure("it diverged"), -1.25, Reward(-1.0, -0.25))
    trials = (failed, MEASURED, better)
    assert SearchResult(trials, finalists=trials).best is better
    assert SearchResult(trials).best is better
    assert best_plans(trials, 1) == [better.plan]
    assert max(trials, key=lambda trial: trial.rank) is better
    assert min(trials, key=lambda trial: trial.rank) is failed


@pytest.mark.parametrize("key", ["plan", "score", "reward", "terms"])
def test_a_line_that_lacks_something_is_refused(key: str) -> None:
    line = {name: value for name, value in MEASURED.to_json().items() if name != key}
    with pytest.raises(KeyError, match=key):
        Trial.from_json(line)
    with pytest.raises((TypeError, ValueError, ConfigError)):
        Trial.from_json({**line, key: "nothing"})
