"""What TensorBoard reads back is each trial once, also after an interruption."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoprune.metric import BITS_PER_CHARACTER
from autoprune.report.data import MeasuredPoint, TrialRow
from autoprune.report.plots import front_figure
from autoprune.report.tensorboard import TrialWriter


def make_trial(reward: float) -> TrialRow:
    sparsities = {"conv1": 0.5 + reward / 10, "conv2": 0.9}
    terms = {"score": reward, "speed": 0.0}
    return TrialRow(reward, terms, sparsities, score=0.9 + reward / 100, latency_ms=2.0 - reward, speedup=2.0)


@pytest.fixture(autouse=True)
def one_second_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files by name, and the name holds seconds: two runs take longer than that."""
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))


TRIALS = [make_trial(reward) for reward in (0.1, 0.4, 0.2, 0.5, 0.3)]


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_a_search_is_read_back(tmp_path: Path) -> None:
    with TrialWriter(tmp_path, "seed = 0") as writer:
        for index, trial in enumerate(TRIALS):
            writer.trial(index, trial)
        writer.front(4, front_figure([MeasuredPoint(1.0, 0.9)]))
        writer.hparams({"agent": "ppo", "episodes": 5, "widths": (8, 16)}, {"speedup": 3.0})
    events = read(tmp_path)
    assert scalars(events, "trial/reward") == [(0, 0.1), (1, 0.4), (2, 0.2), (3, 0.5), (4, 0.3)]
    assert scalars(events, "trial/best_reward") == [(0, 0.1), (1, 0.4), (2, 0.4), (3, 0.5), (4, 0.5)]
    assert scalars(events, "best/latency_ms") == [(0, 1.9), (1, 1.6), (3, 1.5)]
    assert scalars(events, "sparsity/conv1") == [(0, 0.51), (1, 0.54), (3, 0.55)]
    assert scalars(events, "reward/speed")[-1] == (4, 0.0)
    assert scalars(events, "trial/accuracy")[0] == (0, 90.1), "per cent, as everywhere"
    assert scalars(events, "final/speedup") == [(5, 3.0)]
    assert {"trial/accuracy", "trial/latency_ms", "trial/speedup", "reward/score"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["plan", "front"]
    assert len(events.Tensors("config/text_summary")) == 1
    assert "_hparams_/experiment" in events.summary_metadata


def test_another_metric_has_its_own_tag(tmp_path: Path) -> None:
    with TrialWriter(tmp_path, metric=BITS_PER_CHARACTER) as writer:
        writer.trial(0, replace(TRIALS[0], score=-2.5))
    events = read(tmp_path)
    assert scalars(events, "trial/bits_per_character") == scalars(events, "best/bits_per_character") == [(0, 2.5)]
    assert "trial/accuracy" not in events.Tags()["scalars"]


def test_a_resumed_search_shows_each_trial_once(tmp_path: Path) -> None:
    """The interrupted run wrote one trial more than its learner remembers, so that trial is played again."""
    with TrialWriter(tmp_path, "seed = 0") as writer:
        for index in range(4):
            writer.trial(index, TRIALS[index])
    with TrialWriter(tmp_path, "seed = 0", TRIALS[:4]) as writer:
        writer.trial(3, TRIALS[2])
        writer.trial(4, TRIALS[4])
    events = read(tmp_path)
    assert scalars(events, "trial/reward") == [(0, 0.1), (1, 0.4), (2, 0.2), (3, 0.2), (4, 0.3)]
    assert scalars(events, "trial/best_reward")[-2:] == [(3, 0.4), (4, 0.4)]
    assert scalars(events, "sparsity/conv1") == [(0, 0.51), (1, 0.54)]
    assert len(events.Tensors("config/text_summary")) == 1


def test_a_search_begun_again_replaces_what_was_there(tmp_path: Path) -> None:
    for _ in range(2):
        with TrialWriter(tmp_path, "seed = 0") as writer:
            for index in range(3):
                writer.trial(index, TRIALS[index])
            writer.hparams({"agent": "ppo"}, {"speedup": 3.0})
    events = read(tmp_path)
    assert scalars(events, "trial/reward") == [(0, 0.1), (1, 0.4), (2, 0.2)]
    assert scalars(events, "final/speedup") == [(3, 3.0)]


def test_the_final_figures_of_a_finished_search_can_be_written_again(tmp_path: Path) -> None:
    with TrialWriter(tmp_path) as writer:
        for index in range(3):
            writer.trial(index, TRIALS[index])
        writer.hparams({"agent": "ppo"}, {"speedup": 3.0})
    with TrialWriter(tmp_path, "", TRIALS[:3]) as writer:
        writer.hparams({"agent": "ppo"}, {"speedup": 3.5})
    events = read(tmp_path)
    assert len(scalars(events, "trial/reward")) == 3
    assert scalars(events, "final/speedup") == [(3, 3.5)]


def test_a_writer_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with TrialWriter(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
