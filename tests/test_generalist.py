"""A generalist: its tasks are made ready once, its training is kept, resumed and told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.agents.policy import SHIPPED, Policy
from autoprune.config import FamilySection, GeneralistConfig, LearningSection
from autoprune.envs.family import TaskTarget
from autoprune.envs.surrogate import fit_surrogate
from autoprune.errors import AutopruneError, ConfigError
from autoprune.files import write_json
from autoprune.pipeline import generalist as module
from autoprune.pipeline.generalist import FamilyTask, Generalist, member_run, surrogate_plans
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.target import Target
from autoprune.tasks.family import DATA, Member, draw_members, held_out_members
from autoprune.testing import fake_problem
from tests.helpers import measured

PPO = Choice("ppo", {"net": [16], "episodes_per_update": 2})


def config(**learning: object) -> GeneralistConfig:
    return GeneralistConfig(
        family=FamilySection(tasks=8, data=("digits",), plans=20),
        agent=PPO,
        learning=LearningSection(**{"updates": 6, "envs": 3, "judge_every": 3, "measured_share": 0.2, **learning}),  # type: ignore[arg-type]
    )


def fake(config: GeneralistConfig, directory: Path) -> Generalist:
    """A training on tasks that take no time."""
    family, tasks = config.family, {}
    for member in (*draw_members(family.tasks, config.seed, family.data), *held_out_members(family.data)):
        problem = fake_problem(Target(speedup=2.5))
        plans = surrogate_plans(problem, 30, seed=0)
        surrogate = fit_surrogate(problem, plans, [measured(problem.evaluate(plan)).score for plan in plans])
        task_targets = tuple(
            TaskTarget(member.name, replace(problem, target=Target(speedup=speedup))) for speedup in (2.0, 3.0)
        )
        tasks[member.name] = FamilyTask(member.name, problem, task_targets, surrogate)
    return Generalist(config, directory, prepared=tasks)


def test_a_family_is_drawn_alike_from_a_seed_and_never_holds_what_it_is_judged_by() -> None:
    assert draw_members(24, 3) == draw_members(24, 3)
    assert draw_members(24, 3) != draw_members(24, 4)
    drawn, judged = draw_members(60, 0), held_out_members()
    assert len({member.name for member in (*drawn, *judged)}) == len(drawn) + len(judged)
    assert {member.task.name for member in drawn} == set(DATA)

    def builds(members: tuple[Member, ...]) -> set[str]:
        return {member.task.args["model"]["name"] for member in members if "model" in member.task.args}

    assert not builds(drawn) & builds(judged)
    assert len(judged) >= 8
    with pytest.raises(ConfigError, match="digits"):
        draw_members(5, 0, ("digit",))


@pytest.mark.slow
def test_all_kinds_of_models_choose(tmp_path: Path) -> None:
    parted = fake(config().model_copy(update={"family": FamilySection(tasks=25, data=("digits",))}), tmp_path).split()
    learned, choosing, held_out = ({each.name for each in part} for part in parted)
    assert len({name.split("-")[2] for name in choosing}) == len({name.split("-")[2] for name in learned}) == 5
    assert (len(learned), len(choosing)) == (20, 5)
    assert not learned & choosing
    assert not (learned | choosing) & held_out


@pytest.mark.slow
def test_training_keeps_the_policy_that_the_choosing_tasks_like_best(tmp_path: Path) -> None:
    best = fake(config(), tmp_path).train()
    lines = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [2, 5]
    assert best.choosing == max(line["choosing"] for line in lines)
    assert Policy.load(tmp_path / "policy").actions == config().env.actions
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_training_that_is_done_is_not_run_again_and_another_config_is_refused(tmp_path: Path) -> None:
    first = fake(config(), tmp_path)
    best = first.train()
    assert fake(config(), tmp_path).train() == best
    write_json(tmp_path / "config.json", config().to_json())
    with pytest.raises(ConfigError, match=r"learning\.updates"):
        fake(config(updates=7), tmp_path)


@pytest.mark.slow
def test_what_a_killed_training_judged_after_its_checkpoint_is_not_kept_twice(tmp_path: Path) -> None:
    best = fake(config(), tmp_path).train()
    lines = (tmp_path / "judgements.jsonl").read_bytes()
    for name in ("agent.json", "agent-6.safetensors"):  # killed before its checkpoint was there
        (tmp_path / name).unlink()
    assert fake(config(), tmp_path).train() == best
    assert (tmp_path / "judgements.jsonl").read_bytes() == lines


def test_a_family_with_nothing_at_stake_is_told(tmp_path: Path) -> None:
    with pytest.raises(AutopruneError, match=r"family\.tasks"):
        Generalist(config(), tmp_path, prepared={}).train()


@pytest.mark.slow
def test_a_task_is_made_ready_once_for_any_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    model = {"name": "mlp", "widths": [48, 32]}
    member = Member("tiny", Choice("digits", {"model": model}), TrainingSettings(epochs=1, learning_rate=0.02))
    given = config()
    module._prepare(given, member)
    run = member_run(given, member)
    assert (run.directory / "prepared.json").exists()
    other = given.model_copy(update={"env": given.env.model_copy(update={"actions": (Choice("sparsity"),)})})
    assert member_run(other, member).directory == run.directory
    assert member_run(given.model_copy(update={"seed": 1}), member).directory != run.directory
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(module, "machine_identity", lambda: {"cpu": "another CPU"})
        assert member_run(given, member).directory != run.directory
    known = (run.directory / "search" / "evaluations.jsonl").read_text()
    module._prepare(other, member)
    assert (run.directory / "search" / "evaluations.jsonl").read_text() == known


def test_the_shipped_policy_loads_and_has_a_card() -> None:
    policy = Policy.load(SHIPPED)
    assert policy.actions == GeneralistConfig(family=FamilySection()).env.actions
    assert "held-out" in (SHIPPED / "CARD.md").read_text().lower()
