"""The page that explains TensorBoard's tags lists those that are written, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoprune.agents import AGENTS
from autoprune.agents.harness import search
from autoprune.envs import PruneEnv
from autoprune.metric import ACCURACY
from autoprune.pipeline.compare import compare_all, jobs_of
from autoprune.pipeline.monitor import SearchMonitor, trial_row
from autoprune.pipeline.outcomes import OutcomeLog
from autoprune.progress import SILENT
from autoprune.registry import Choice
from autoprune.report.data import MeasuredPoint
from autoprune.report.tensorboard import FamilyWriter, TrialWriter
from autoprune.target import Target
from autoprune.testing import fake_problem

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "guide" / "tensorboard.md").read_text(encoding="utf-8")
OF_METHODS = re.compile(r"^Methods add what they have:\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
NAMED = "sparsity|tried_sparsity|tried_group_size|tried_recipe|reference"
PLACE = {"reference": "RULE", "tried_recipe": "NAME"}
PPO = Choice("ppo", {"net": [8], "episodes_per_update": 2})
SAC = Choice("sac", {"net": [8], "batch_size": 4})


def explained() -> set[str]:
    """The tags of the page, but for those that methods add."""
    rows = [line.split("|")[1] for line in OF_METHODS.sub("", PAGE).splitlines() if line.startswith("| `")]
    return {tag for row in rows for tag in re.findall(r"`([^`]+)`", row)}


def tags(directory: Path) -> set[str]:
    """The tags of a run, a layer's, a rule's or a recipe's name left out of them."""
    events = EventAccumulator(str(directory))
    events.Reload()
    found: dict[str, Any] = events.Tags()
    listed = {*found["scalars"], *found["images"], *found["tensors"], *found["histograms"], *events.summary_metadata}
    plain = {tag.removesuffix("/text_summary") for tag in listed}
    return {re.sub(f"^({NAMED})/.*$", lambda named: f"{named[1]}/{PLACE.get(named[1], 'LAYER')}", tag) for tag in plain}


def watched(agent: Choice, directory: Path, episodes: int) -> None:
    """A search as a run shows it."""
    env = PruneEnv(fake_problem(), ("sparsity", "group_size", "epochs"))
    dense = MeasuredPoint(env.problem.table.dense_ms, env.problem.dense_score)
    with SILENT.bar("search", episodes) as bar:
        monitor = SearchMonitor(directory, "seed = 0", ACCURACY, dense, bar, str, references={"uniform": 1.0})
        made = AGENTS.create(agent)
        made.watch(monitor.learning)
        search(made, env, episodes, seed=0, on_trial=monitor.trial)
        monitor.close()


def test_the_page_lists_what_is_written(tmp_path: Path) -> None:
    watched(PPO, tmp_path / "ppo", 6)
    watched(SAC, tmp_path / "sac", 3)
    with TrialWriter(tmp_path / "finetune") as writer:
        writer.training(1, {"sparsity": 0.5, "sparsity/conv": 0.5}, {})
    with TrialWriter(tmp_path / "final") as writer:
        writer.hparams({"agent": "ppo"}, {"accuracy": 90.0, "speedup": 3.0})
    family = FamilyWriter(tmp_path / "family")
    family.update(0, [0.1], [0.2])
    family.judgement(0, 0.1, 0.2, 0.3)
    family.close()
    written = set().union(*(tags(folder) for folder in tmp_path.iterdir()))
    assert written == explained()


def test_a_learner_is_shown_at_the_trials_it_learned_from(tmp_path: Path) -> None:
    watched(PPO, tmp_path, 6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/approx_kl")] == [3, 5], "an update each after 2 and 4 trials"
    assert [event.step for event in events.Scalars("reference/uniform")] == list(range(6))
    assert len(events.Images("front")) == 1, "however few trials there are"


@pytest.mark.parametrize("name", ["random", "cma_es"])
def test_a_comparison_shows_every_agents_curve(name: str, tmp_path: Path) -> None:
    env = PruneEnv(fake_problem(Target(speedup=2.5, over="eager")), ("mix", "coefficient"))
    jobs = jobs_of([Choice(name)], 2, (1, 6))
    compare_all("t", env, jobs, env.problem.evaluate, OutcomeLog(tmp_path / "outcomes.jsonl"), curves=tmp_path)
    for seed in (0, 1):
        events = EventAccumulator(str(tmp_path / f"{name}-{seed}"))
        events.Reload()
        best = [event.value for event in events.Scalars("trial/best_reward")]
        assert best == sorted(best)
        assert len(best) == 6


def test_a_plans_numbers_are_its_choices() -> None:
    env = PruneEnv(fake_problem(), ("sparsity", "group_size", "epochs"))
    trial = search(AGENTS.create(Choice("random")), env, 1, seed=0).trials[0]
    row = trial_row(trial)
    assert set(row.choices["group_size"]) == set(trial.plan.layers)
    assert row.choices["recipe"] == {"epochs": float(trial.plan.settings["epochs"])}
