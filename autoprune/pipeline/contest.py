"""The stage that fine-tunes several plans before one is chosen: the best of the search, and the best of each rule.

Scores before training are close where a model forgives much, and their order is not that of the scores after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoprune.agents.harness import SearchResult
from autoprune.envs.trial import Trial
from autoprune.errors import ConfigError, FileError, InfeasibleTarget, NumericalError
from autoprune.files import read_json, write_json
from autoprune.pipeline.application import AppliedPlan, adopt_fine_tuned
from autoprune.pipeline.correction import Corrected
from autoprune.pipeline.preparation import Context, Preparation
from autoprune.plan import Plan

FOLDER, RECORD = "contenders", "contenders.json"


@dataclass(frozen=True)
class Contender:
    """A plan that was fine-tuned.

    Attributes:
        source: the agent or the rule that made it.
        plan: on the target.
        speedup: measured before the training, over what the target's is over; None where none was asked for.
        validation: score of the fine-tuned model on the validation split, by which one is chosen.
        test: likewise on the test split, which nothing is chosen by.
    """

    source: str
    plan: Plan
    speedup: float | None
    validation: float
    test: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "plan": self.plan.to_json()}


def best_by_source(searched: SearchResult, agent: str) -> dict[str, Trial]:
    """The agent and every rule, each with its best trial, the search's best first; without those that only failed.

    Args:
        searched: where finalists were timed again, their new figures count.
        agent: its name.
    """
    again = {trial.plan.key: trial for trial in searched.finalists}
    best = {}
    for source, trials in {agent: searched.trials, **searched.rules}.items():
        done = [trial for trial in trials if not trial.failed]
        timed = [again[trial.plan.key] for trial in done if trial.plan.key in again]
        if done:
            best[source] = max(timed or done, key=lambda trial: trial.rank)
    chosen = searched.best
    first = next((name for name, trial in best.items() if trial.plan.key == chosen.plan.key), agent)
    others = sorted((name for name in best if name != first), key=lambda name: best[name].rank, reverse=True)
    return {first: chosen, **{name: best[name] for name in others}}


def contest(
    context: Context, preparation: Preparation, plans: Mapping[str, Plan], correct: Callable[[Plan], Corrected | None]
) -> tuple[Contender, ...]:
    """Fine-tunes plans, each in a folder of its own; those that were done before are read.

    Args:
        context: of the run.
        preparation: the stages before the search.
        plans: source -> its plan.
        correct: puts a plan on the target by measurement; None where nothing is measured.

    Returns:
        The contenders in the order of `plans`; plans that are the same on the target are trained once.

    Raises:
        NumericalError: none is left, and the training of the last one diverged.
        InfeasibleTarget: none is left, and the last one could not be put on the target.
    """
    contenders: list[Contender] = []
    error: NumericalError | InfeasibleTarget | None = None
    for number, (source, plan) in enumerate(plans.items(), start=1):
        folder = _folder(context, source)
        at = replace(context, directory=folder)
        context.progress.say(f"contender {number} of {len(plans)}: the plan of {source}")
        try:
            on_target, speedup = _on_target(folder / "plan.json", plan, correct)
            if any(each.plan.key == on_target.key for each in contenders):
                continue
            model = AppliedPlan(at, preparation, on_target).fine_tuned.model
        except (NumericalError, InfeasibleTarget) as out:
            context.progress.say(f"the plan of {source} is out: {out}")
            error = out
            continue
        task = preparation.prepared.task
        contenders.append(Contender(source, on_target, speedup, task.evaluate(model), task.test(model)))
        context.progress.say(f"the plan of {source}: {task.metric.describe(contenders[-1].validation)} after training")
    if not contenders:
        assert error is not None, "a contest has a plan"
        raise error
    return tuple(contenders)


def _folder(context: Context, source: str) -> Path:
    """Where the plan of a source is trained."""
    return context.directory / FOLDER / source.replace(" ", "_")


def _on_target(path: Path, plan: Plan, correct: Callable[[Plan], Corrected | None]) -> tuple[Plan, float | None]:
    """The plan on the target and its speed-up there, measured once a run."""
    if path.exists() and (known := read_json(path, "a contender's plan")).get("of") == plan.key:
        return Plan.from_json(known.get("plan")), known.get("speedup")
    corrected = correct(plan)
    moved, speedup = (plan, None) if corrected is None else (corrected.plan, corrected.reached.speedup)
    write_json(path, {"of": plan.key, "plan": moved.to_json(), "speedup": speedup})
    return moved, speedup


def winner(contenders: Sequence[Contender]) -> Contender:
    """The best on the validation split; the earlier one of equals."""
    return max(contenders, key=lambda each: each.validation)


def take_winner(context: Context, contenders: Sequence[Contender]) -> Plan:
    """Makes the winner's fine-tuned model the run's, and keeps the figures of all."""
    won = winner(contenders)
    write_json(context.directory / RECORD, {"contenders": [each.to_json() for each in contenders]})
    adopt_fine_tuned(context, _folder(context, won.source))
    return won.plan


def clear(directory: Path) -> None:
    """Removes the contenders' models, of which the run has what it needs."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def read_contenders(directory: Path) -> tuple[Contender, ...]:
    """Those of a run; none where one plan alone was trained.

    Raises:
        FileError: the file is corrupt.
    """
    path = directory / RECORD
    if not path.exists():
        return ()
    try:
        rows = read_json(path, "the record of the contenders")["contenders"]
        return tuple(Contender(**{**row, "plan": Plan.from_json(row["plan"])}) for row in rows)
    except (KeyError, TypeError, ConfigError) as error:
        raise FileError(
            f"the record of the contenders is corrupt: {path} ({error}). Delete the file: the report then goes without."
        ) from None
