"""Agents side by side: the same episodes, the same number of evaluations, and plans measured at the same speed-up.

A search scores plans really and takes their latency from the table, so that no agent is lucky with the clock. What is
reported is measured: the best plan an agent has after so many evaluations is repacked and timed in turns with the
knapsack's, moved until it is as fast as the target asks, and scored there. The plans of the last checkpoint are
fine-tuned, and judged by the test score after that (`yardstick.py`, `judgement.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from autoprune.agents import AGENTS
from autoprune.agents.baseline import uniform_at
from autoprune.agents.harness import search
from autoprune.config import load_config
from autoprune.envs import PruneEnv
from autoprune.envs.rewards import terminal_reward
from autoprune.envs.trial import Trial
from autoprune.errors import ConfigError
from autoprune.evaluation.measurement import Evaluate
from autoprune.files import write_json, write_text
from autoprune.pipeline.judgement import Judgement, judgement_text
from autoprune.pipeline.monitor import trial_row
from autoprune.pipeline.outcomes import (
    FIVE_RECIPES,
    ONE_SEED,
    UNASKED,
    Outcome,
    OutcomeLog,
    cost_table,
    of_last_checkpoint,
    summary_table,
    task_table,
)
from autoprune.pipeline.recipes import best_of_five
from autoprune.pipeline.run import Run
from autoprune.pipeline.yardstick import Yardstick, at_speedup
from autoprune.plan import Plan
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.report.tensorboard import TrialWriter
from autoprune.target import Target

_ACTIONS = '["mix", {name = "coefficient", reach = 1.0}]'  # the shipped policy's
_COST = "What the searches spent up to their last checkpoint, on average; plans that were remembered cost no time:"
WITHOUT_EVALUATION = (*ONE_SEED, "policy")  # their first plan is made before any is scored
Entrant = Callable[[], list[Outcome]]  # what is no agent of the registry, run once


def check_target(target: Target) -> None:
    """Raises ConfigError where the target has no speed-up: plans are compared at one."""
    if target.speedup is None:
        asked = ", ".join(target.asked)
        raise ConfigError(f"agents are compared at a speed-up, and the target has {asked} alone: set target.speedup.")


def budgets_of(agent: Choice, budgets: Sequence[int]) -> list[int]:
    """The checkpoints that say something of an agent: rules have one, searches those from 1 evaluation on."""
    if agent.name in ONE_SEED:
        return [UNASKED]
    return [budget for budget in budgets if budget > 0 or agent.name in WITHOUT_EVALUATION]


def compare(
    name: str,
    env: PruneEnv,
    agent: Choice,
    seed: int,
    budgets: Sequence[int],
    measure: Evaluate,
    steps: int = 0,
    shown: Callable[[int, Trial], None] = lambda index, trial: None,
) -> list[Outcome]:
    """Runs one agent once and measures its best plan at every checkpoint; one where nothing succeeded has no outcome.

    Args:
        name: of the task.
        env: its evaluation scores plans and takes latency from the table; the target is a speed-up.
        agent: a registry row.
        seed: of the search.
        budgets: checkpoints, evaluations; 0 is a plan made without any.
        measure: plan -> a measurement with the clock; remembered by the caller, so that equal plans measure alike.
        steps: of the optimizer, that the evaluation of a plan trains for.
        shown: is told every trial, with its index.

    Raises:
        ConfigError: the target is no speed-up: plans are compared at one.
    """
    check_target(env.problem.target)
    started = time.perf_counter()
    ticks: list[float] = []

    def tick(index: int, trial: Trial) -> None:
        ticks.append(time.perf_counter() - started)
        shown(index, trial)

    found = search(AGENTS.create(agent), env, max(1, *budgets), seed, on_trial=tick)
    outcomes = []
    for budget in budgets:
        trials = found.trials[: max(1, budget)]
        best = max(trials, key=lambda trial: (not trial.failed, trial.reward))
        moved = at_speedup(env.problem, best.plan, measure)
        if best.failed or moved is None:
            continue
        measured, reward = moved.measurement, terminal_reward(env.problem, moved.measurement).total
        took, made = ticks[len(trials) - 1], len(trials) if budget else 0
        figures = (best.reward, measured.score, measured.speedup, reward, took, made, made * steps)
        outcomes.append(Outcome(name, str(agent), seed, budget, *figures, moved.plan.to_json()))
    return outcomes


def uniform_outcome(name: str, env: PruneEnv, measure: Evaluate) -> Outcome:
    """The uniform rule at the target, by the clock."""
    wanted = env.problem.required_speedup
    assert wanted is not None
    trial = uniform_at(env.of(replace(env.problem, evaluate=measure)), wanted)
    if trial is None:
        raise ConfigError(f"{name}: no uniform plan was measured to be {wanted:g}x faster.")
    figures = (trial.reward, trial.measurement.score, trial.measurement.speedup, trial.reward)
    return Outcome(name, "uniform", 0, UNASKED, *figures, seconds=0.0, trials=0, steps=0, plan=trial.plan.to_json())


@dataclass(frozen=True)
class Job:
    """One search, looked at after some numbers of evaluations."""

    agent: Choice
    seed: int
    budgets: tuple[int, ...]


def jobs_of(agents: Sequence[Choice], seeds: int, budgets: Sequence[int]) -> list[Job]:
    """Every agent and seed; rules that draw nothing have one seed."""
    return [
        Job(agent, seed, tuple(budgets_of(agent, budgets)))
        for agent in agents
        for seed in range(1 if agent.name in ONE_SEED else seeds)
    ]


def compare_all(
    name: str,
    env: PruneEnv,
    jobs: Sequence[Job],
    measure: Evaluate,
    log: OutcomeLog,
    progress: Progress = SILENT,
    steps: int = 0,
    curves: Path | None = None,
    entrants: Mapping[str, Entrant] | None = None,
) -> list[Outcome]:
    """Runs the jobs on one task, but for those whose outcomes are in the log; returns what the log then holds.

    `steps`: of the optimizer, that the evaluation of a plan trains for. `curves`: a folder for TensorBoard, one run in
    it a job, so that agents are seen beside each other. `entrants`: those by name that are no agents.
    """
    done = {(each.agent, each.seed, each.evaluations) for each in log.read() if each.task == name}
    with progress.bar(f"compare {name}", len(jobs)) as bar:
        for job in jobs:
            if any((str(job.agent), job.seed, budget) not in done for budget in job.budgets):
                entrant = (entrants or {}).get(job.agent.name)
                made = entrant() if entrant else _made(name, env, job, measure, steps, curves)
                log.append([each for each in made if (each.agent, each.seed, each.evaluations) not in done])
                if lacking := set(job.budgets) - {each.evaluations for each in made}:
                    progress.say(f"{job.agent}, seed {job.seed}: every plan failed after {sorted(lacking)} evaluations")
            bar.advance(1, f"{job.agent}, seed {job.seed}")
    return [each for each in log.read() if each.task == name]


def _made(name: str, env: PruneEnv, job: Job, measure: Evaluate, steps: int, curves: Path | None) -> list[Outcome]:
    """The outcomes of one job, its trials shown in TensorBoard where there is a folder for that."""
    if job.agent.name == "uniform":
        return [uniform_outcome(name, env, measure)]
    if curves is None:
        return compare(name, env, job.agent, job.seed, job.budgets, measure, steps)
    with TrialWriter(curves / f"{job.agent.name}-{job.seed}") as writer:

        def shown(index: int, trial: Trial) -> None:
            writer.trial(index, trial_row(trial))

        return compare(name, env, job.agent, job.seed, job.budgets, measure, steps, shown)


@dataclass(frozen=True)
class TaskComparison:
    """A comparison on the task of one run.

    Attributes:
        name: of the task.
        run: that prepared it.
        env: its problem, as episodes; the target is a speed-up.
        log: of the outcomes.
        folder: where what is trained and scored is kept.
    """

    name: str
    run: Run
    env: PruneEnv
    log: OutcomeLog
    folder: Path

    def hold(self, jobs: Sequence[Job], *, finetune: bool, evaluations: int, curves: Path | None = None) -> Judgement:
        """Runs the jobs; with `finetune` it also judges the plans of the checkpoint after so many evaluations.

        Plans are timed in turns with the knapsack's, whose speed-up the latency table predicts.
        """
        check_target(self.env.problem.target)
        run, reference = self.run, self.env.solved()
        predicted = self.env.problem.table.predict_speedup(reference)
        measure = run.search.paired(reference, predicted)
        yardstick = Yardstick(self.name, run, reference, predicted, self.folder)
        subject = run.preparation.evaluator.subject
        entrants = {FIVE_RECIPES: partial(best_of_five, self.name, self.env, subject, measure, yardstick)}
        steps = run.context.choices.recovery.steps
        outcomes = compare_all(
            self.name, self.env, jobs, measure, self.log, run.progress, steps, curves, entrants=entrants
        )
        if finetune:
            last = of_last_checkpoint(outcomes, evaluations)
            if old := sorted({each.agent for each in last if each.plan is None}):
                run.progress.say(f"not judged, as their plans were not kept: {', '.join(old)}. Delete {self.log.path}")
            yardstick.judge([Plan.from_json(each.plan) for each in last if each.plan is not None])
        return Judgement(outcomes, evaluations, yardstick.trained_log.read(), yardstick.score_log.read())


def compare_run(
    config: Path,
    run_dir: Path | None,
    overrides: Sequence[str],
    agents: Sequence[str],
    evaluations: Sequence[str],
    seeds: int,
    progress: Progress = SILENT,
    *,
    finetune: bool = True,
) -> str:
    """`compare_all` on the task of a config, in a run directory; returns the tables, which it also writes there.

    With `finetune` the plans of the last checkpoint are fine-tuned and judged by their test score.

    Raises:
        ConfigError: an agent nobody knows, checkpoints that are no numbers, or a target that is no speed-up.
    """
    try:
        budgets = sorted({int(each) for each in evaluations})
        if budgets[0] < 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"evaluations are numbers such as 0,1,10,50, not {','.join(evaluations)!r}.") from None
    choices = [Choice(name.strip()) for name in agents]
    for choice in choices:
        if choice.name != FIVE_RECIPES:
            AGENTS.get(choice.name)
    loaded = load_config(config, [*overrides, "env.timing=table", f"env.actions={_ACTIONS}"])
    check_target(loaded.target)
    run = Run(loaded, run_dir or Path("runs") / f"{config.stem}-compare", progress=progress)
    progress.say(f"whatever the config says, trials are timed by the table, and the actions are {_ACTIONS}")
    comparison = TaskComparison(
        run.task.name, run, run.search.env, OutcomeLog(run.directory / "outcomes.jsonl"), run.directory / "judged"
    )
    judgement = comparison.hold(
        jobs_of(choices, seeds, budgets),
        finetune=finetune,
        evaluations=max(budgets),
        curves=run.directory / "tensorboard",
    )
    text = report(judgement)
    write_json(run.directory / "comparison.json", judgement.to_json())
    write_text(run.directory / "comparison.md", text)
    return text


def report(judgement: Judgement) -> str:
    """The tables, with what their figures are; those after training first, where any plan was trained."""
    outcomes, evaluations = judgement.outcomes, judgement.evaluations
    cost = cost_table(outcomes)
    return (
        (f"{judgement_text(judgement)}\n\nBefore training. " if judgement.trained else "")
        + "Measured score above the knapsack's at the same measured speed-up, in points: interquartile mean over tasks "
        f"and seeds, 95% bootstrap interval.\n\n{summary_table(outcomes)}\n\nMeasured score, in points, after "
        f"{evaluations} evaluations:\n\n{task_table(outcomes, evaluations)}"
        + (f"\n\n{_COST}\n\n{cost}" if cost else "")
    )
