"""Several plans are fine-tuned before one is chosen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from autoprune.agents.harness import SearchResult
from autoprune.config import Config, parse_config
from autoprune.envs.trial import Reward, Trial
from autoprune.errors import FileError, NumericalError
from autoprune.evaluation.measurement import Measurement
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.files import read_tensors, write_json
from autoprune.latency.timer import Latency
from autoprune.pipeline import application, contest
from autoprune.pipeline.contest import best_by_source, read_contenders, winner
from autoprune.pipeline.results import report_of
from autoprune.pipeline.run import Run
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.testing import FakeClock

SMALL = {
    "task": {"name": "digits", "widths": [4, 8]},
    "dense": {"epochs": 1, "learning_rate": 0.1},
    "target": {"sparsity": 0.6},
    "latency": {"samples": 3, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
    "env": {"actions": ["sparsity"], "min_saving": 0.0, "timing": "table"},
    "search": {"agent": "random", "episodes": 3, "contenders": 3, "finalists": 1},
    "finetune": {"settings": {"epochs": 1, "learning_rate": 0.05}},
}


def config() -> Config:
    return parse_config(SMALL, "test")


def run_in(folder: Path) -> Run:
    return Run(config(), folder, clock=FakeClock(2.0**-10))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the end of its search, made once."""
    run = run_in(tmp_path_factory.mktemp("contest") / "run")
    assert run.searched.trials
    run.lock.close()
    return run.directory


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


def plan(sparsity: float) -> Plan:
    return Plan({"a": LayerPlan(sparsity, Choice("group", {"size": 4}), Choice("magnitude"))}, Choice("one_shot"))


def trial(sparsity: float, reward: float) -> Trial:
    latency = Latency.from_samples([1.0], 1)
    return Trial(plan(sparsity), Measurement(0.9, latency.median_ms, 2.0), reward, Reward(reward, 0.0))


def test_the_best_of_the_search_stands_first_then_the_best_of_each_rule() -> None:
    trials = (trial(0.1, 1.0), trial(0.2, 2.0))
    rules = {"uniform": (trial(0.3, 5.0), trial(0.4, 4.0)), "knapsack": (trial(0.5, 3.0),)}
    found = best_by_source(SearchResult(trials, rules=rules), "ppo")
    assert list(found) == ["uniform", "knapsack", "ppo"]
    assert [each.plan for each in found.values()] == [plan(0.3), plan(0.5), plan(0.2)]
    again = (trial(0.4, 4.0), trial(0.3, 1.0), trial(0.5, 4.5))  # timed again: the luckiest is not the best
    found = best_by_source(SearchResult(trials, rules=rules, finalists=again), "ppo")
    assert [each.plan for each in found.values()] == [plan(0.5), plan(0.4), plan(0.2)]


@pytest.mark.slow
def test_the_contender_that_is_best_after_its_training_is_the_run_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(folder)
    trained: list[Plan] = []
    monkeypatch.setattr(application, "finetune_", recorded(trained, finetune_))
    tested: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(contest, "take_winner", kept(tested, contest.take_winner))
    monkeypatch.setattr("autoprune.pipeline.run.take_winner", contest.take_winner)
    chosen = run.plan
    contenders = read_contenders(run.directory)
    assert len(contenders) == len(trained) > 1
    won = max(contenders, key=lambda each: each.validation)
    assert chosen == won.plan == Plan.load(run.directory / "plan.json")
    for name, value in run.masked.state_dict().items():  # not trained again
        assert torch.equal(value, tested[name]), name
    assert len(trained) == len(contenders)
    assert run.task.evaluate(run.masked) == won.validation
    assert run.task.test(run.masked) == won.test
    assert not (run.directory / "contenders").exists()
    record = report_of(run).record
    assert [row.source for row in record.contenders if row.chosen] == [won.source]
    assert [row.agent for row in record.searches if row.agent.endswith(", chosen")] == [f"{won.source}, chosen"]


@pytest.mark.slow
def test_a_contest_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run_in(Path(shutil.copytree(folder, tmp_path / "whole")))
    wanted = undisturbed.plan
    trained: list[Plan] = []

    def stopped_in_the_second(model: object, plan: Plan, *args: object, **kwargs: object) -> None:
        trained.append(plan)
        if len(trained) == 2:
            raise KeyboardInterrupt
        finetune_(model, plan, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(application, "finetune_", stopped_in_the_second)
    stopped = run_in(folder)
    with pytest.raises(KeyboardInterrupt):
        _ = stopped.plan
    stopped.lock.close()
    monkeypatch.setattr(application, "finetune_", recorded(trained, finetune_))
    again = run_in(folder)
    assert again.plan == wanted
    assert len(trained) == len(read_contenders(again.directory)) + 1  # the second one twice
    assert read_contenders(again.directory) == read_contenders(undisturbed.directory)


@pytest.mark.slow
def test_a_plan_whose_training_diverges_is_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Plan] = []

    def diverging(model: object, plan: Plan, *args: object, **kwargs: object) -> None:
        seen.append(plan)
        if len(seen) <= application.TRAININGS:
            raise NumericalError("the loss is nan")
        finetune_(model, plan, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(application, "finetune_", diverging)
    run = run_in(folder)
    first = next(iter(best_by_source(run.searched, "random").values())).plan
    assert run.plan.layers != first.layers
    assert first.key not in {each.plan.key for each in read_contenders(run.directory)}


@pytest.mark.slow
def test_where_all_diverge_the_run_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*args: object, **kwargs: object) -> None:
        raise NumericalError("the loss is nan")

    monkeypatch.setattr(application, "finetune_", diverging)
    with pytest.raises(NumericalError, match="the loss is nan"):
        _ = run_in(folder).plan


def test_a_corrupt_record_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_json(tmp_path / "contenders.json", {"contenders": [{"source": "ppo"}]})
    with pytest.raises(FileError, match="Delete the file"):
        read_contenders(tmp_path)


def test_the_earlier_of_equals_wins() -> None:
    first = contest.Contender("ppo", plan(0.5), 2.0, 0.9, 0.8)
    assert winner([first, contest.Contender("uniform", plan(0.6), 2.0, 0.9, 0.95)]) is first


def recorded(trained: list[Plan], train: object) -> object:
    """Counts what is trained."""

    def counted(model: object, plan: Plan, *args: object, **kwargs: object) -> None:
        trained.append(plan)
        train(model, plan, *args, **kwargs)  # type: ignore[operator]

    return counted


def kept(tested: dict[str, torch.Tensor], take: object) -> object:
    """Keeps the winner's weights as its training left them."""

    def taken(context: object, contenders: tuple[contest.Contender, ...]) -> Plan:
        won = winner(contenders)
        folder = context.directory / contest.FOLDER / won.source.replace(" ", "_")  # type: ignore[attr-defined]
        tested.update(read_tensors(folder / "masked.safetensors", "the saved model")[0])
        return take(context, contenders)  # type: ignore[operator, no-any-return]

    return taken
