"""Agents side by side: the same episodes, the same number of evaluations, and plans measured at the same speed-up.

A search scores plans really and takes their latency from the table, so that no agent is lucky with the clock. What is
reported is measured: the best plan an agent has after so many evaluations is repacked and timed in turns with the
knapsack's, moved until it is as fast as the target asks, and scored there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoprune.agents import AGENTS
from autoprune.agents.baseline import CLOSE, uniform_at
from autoprune.agents.harness import search
from autoprune.config import load_config
from autoprune.documents import parsed
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.projection import meet, release_useless
from autoprune.envs.rewards import terminal_reward
from autoprune.envs.trial import Trial
from autoprune.errors import ConfigError, FileError
from autoprune.evaluation.measurement import CachedEvaluate, Evaluate, Failure, Measurement
from autoprune.files import append_line, read_lines
from autoprune.pipeline.monitor import trial_row
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.report.table import markdown_table
from autoprune.report.tensorboard import TrialWriter

_ACTIONS = '["mix", {name = "coefficient", reach = 1.0}]'  # the shipped policy's
UNASKED = 0  # evaluations of a rule that makes its plan without any
_CORRECTIONS = 8  # of the predicted speed-up, for one measured plan
_RESAMPLES = 2000
_COST = "What the searches spent up to their last checkpoint, on average; plans that were remembered cost no time:"
ONE_SEED = ("uniform", "greedy", "knapsack")  # these draw nothing
WITHOUT_EVALUATION = ("uniform", "greedy", "knapsack", "policy")  # their first plan is made before any is scored


@dataclass(frozen=True)
class Outcome:
    """The best plan an agent had after some evaluations, as measured.

    Attributes:
        task: the problem's name.
        agent: the registry row, with its arguments where they are not the default ones.
        evaluations: how many it was given; 0 for a plan made without any.
        reward: of the search, by scores and the latency table.
        score: of the plan moved to the target's measured speed-up.
        speedup: measured.
        measured_reward: of that score and speed-up.
        seconds: the search took up to there, evaluations that were remembered not counted.
        trials: it really made, of those that it was given; None where that was not noted.
        steps: of the optimizer, that its trials trained for; likewise.
    """

    task: str
    agent: str
    seed: int
    evaluations: int
    reward: float
    score: float
    speedup: float
    measured_reward: float
    seconds: float
    trials: int | None = None
    steps: int | None = None


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
    if env.problem.target.speedup is None:
        raise ConfigError("agents are compared at a speed-up: set target.speedup.")
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
        measured = at_speedup(env.problem, best.plan, measure)
        if best.failed or measured is None:
            continue
        reward = terminal_reward(env.problem, measured).total
        took, made = ticks[len(trials) - 1], len(trials) if budget else 0
        figures = (best.reward, measured.score, measured.speedup, reward, took, made, made * steps)
        outcomes.append(Outcome(name, str(agent), seed, budget, *figures))
    return outcomes


def at_speedup(problem: Problem, plan: Plan, measure: Evaluate) -> Measurement | None:
    """Shifts all sparsities by one amount until the *measured* speed-up is at most `CLOSE` below the target's.

    The shift is found by bisection on the speed-up that the latency table predicts.

    Returns:
        The best-scoring measurement that is fast enough, else the fastest; None when all evaluations failed.
    """
    target = problem.target.speedup
    assert target is not None
    table, predicted = problem.table, problem.table.predict_speedup(plan)
    low, high = 1.0, table.predict_speedup(problem.uniform(problem.max_sparsity))  # bounds of `predicted`
    measurements: list[Measurement] = []
    candidate = plan
    for _ in range(_CORRECTIONS):
        measured = measure(candidate)
        if isinstance(measured, Failure):
            break
        measurements.append(measured)
        if abs(measured.speedup / target - 1.0) <= CLOSE:
            break
        low, high = (low, min(high, predicted)) if measured.speedup > target else (max(low, predicted), high)
        guess = predicted * target / measured.speedup
        predicted = guess if low < guess < high else math.sqrt(low * high)
        candidate = release_useless(meet(plan, table, max(1.001, predicted), problem.max_sparsity), table)
    fast = [each for each in measurements if each.speedup >= target * (1.0 - CLOSE)]
    if fast:
        return max(fast, key=lambda each: each.score)
    return max(measurements, key=lambda each: each.speedup, default=None)


class OutcomeLog:
    """Outcomes as JSON lines, so that a comparison goes on where it was stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Outcome]:
        lines = read_lines(self.path, "the outcomes")
        try:
            return parsed(list[Outcome], lines)
        except FileError as error:
            raise FileError(f"the outcomes are corrupt: {self.path} ({error}). Delete the file.") from None

    def append(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            append_line(self.path, asdict(outcome))


# What outcomes add up to ---------------------------------------------------------------------------------------------


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half, the ends weighed by what of them is in it (Agarwal et al. 2021, rliable)."""
    return float(_interquartile_means(np.asarray(values, np.float64)))


def _interquartile_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those over the last axis."""
    ordered, count = np.sort(values), values.shape[-1]
    edges = np.clip(np.arange(count + 1) / count, 0.25, 0.75)
    weights = np.diff(edges)
    means: NDArray[np.float64] = (ordered * weights).sum(axis=-1) / weights.sum()
    return means


def interval(by_task: Mapping[str, Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the interquartile mean over all values, resampled within each task (stratified)."""
    draws = np.random.default_rng(seed)
    groups = [np.asarray(values, np.float64) for values in by_task.values()]
    resampled = [
        np.concatenate([group[draws.integers(0, len(group), len(group))] for group in groups])
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(_interquartile_means(np.array(resampled)), (0.025, 0.975))
    return float(low), float(high)


def points_above(outcomes: Sequence[Outcome], agent: str, evaluations: int) -> dict[str, list[float]]:
    """Task -> points of an agent's measured scores above the knapsack's on it, a seed each."""
    base = {each.task: each.score for each in outcomes if each.agent == "knapsack"}
    above: dict[str, list[float]] = {}
    for each in outcomes:
        if (each.agent, each.evaluations) == (agent, evaluations) and each.task in base:
            above.setdefault(each.task, []).append(100 * (each.score - base[each.task]))
    return above


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Agent by evaluations: measured score above the knapsack's, interquartile mean and interval, in points."""
    budgets = sorted({each.evaluations for each in outcomes})
    rows = []
    for agent in dict.fromkeys(each.agent for each in outcomes):
        cells = []
        for budget in budgets:
            by_task = points_above(outcomes, agent, budget)
            if not by_task:
                cells.append("-")
                continue
            everything = [value for values in by_task.values() for value in values]
            low, high = interval(by_task)
            cells.append(f"{interquartile_mean(everything):+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append([agent, *cells])
    return markdown_table(("agent", *(f"{budget} evaluations" for budget in budgets)), rows, left=1)


def task_table(outcomes: Sequence[Outcome], evaluations: int) -> str:
    """Task by agent: measured score in points, mean over seeds, at so many evaluations or a rule's none."""
    agents = list(dict.fromkeys(each.agent for each in outcomes))
    rows = []
    for task in dict.fromkeys(each.task for each in outcomes):
        cells = []
        for agent in agents:
            mine = [each for each in outcomes if (each.task, each.agent) == (task, agent)]
            fitting = [each for each in mine if each.evaluations == evaluations] or [
                each for each in mine if each.evaluations == UNASKED and agent in ONE_SEED
            ]
            cells.append(f"{100 * float(np.mean([each.score for each in fitting])):.2f}" if fitting else "-")
        rows.append([task, *cells])
    return markdown_table(("task", *agents), rows, left=1)


def cost_table(outcomes: Sequence[Outcome]) -> str:
    """What each agent spent up to its last checkpoint: trials, seconds and training steps, on average."""
    rows = []
    for agent in dict.fromkeys(each.agent for each in outcomes):
        mine = [each for each in outcomes if each.agent == agent and each.trials is not None]
        last = [each for each in mine if each.evaluations == max(other.evaluations for other in mine)]
        if last:
            trials, seconds, steps = (
                float(np.mean([getattr(each, name) for each in last])) for name in ("trials", "seconds", "steps")
            )
            rows.append([agent, f"{trials:.0f}", f"{seconds:.1f}", f"{steps:.0f}"])
    return markdown_table(("agent", "trials", "seconds", "training steps"), rows, left=1) if rows else ""


def uniform_outcome(name: str, env: PruneEnv, measure: Evaluate) -> Outcome:
    """The uniform rule at the target, by the clock."""
    wanted = env.problem.target.speedup
    assert wanted is not None
    trial = uniform_at(env.of(replace(env.problem, evaluate=measure)), wanted)
    if trial is None:
        raise ConfigError(f"{name}: no uniform plan was measured to be {wanted:g}x faster.")
    score, speedup = trial.measurement.score, trial.measurement.speedup
    return Outcome(name, "uniform", 0, UNASKED, trial.reward, score, speedup, trial.reward, 0.0, trials=0, steps=0)


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
) -> list[Outcome]:
    """Runs the jobs on one task, but for those whose outcomes are in the log; returns what the log then holds.

    `steps`: of the optimizer, that the evaluation of a plan trains for. `curves`: a folder for TensorBoard, one run in
    it a job, so that agents are seen beside each other.
    """
    done = {(each.agent, each.seed, each.evaluations) for each in log.read() if each.task == name}
    with progress.bar(f"compare {name}", len(jobs)) as bar:
        for job in jobs:
            if any((str(job.agent), job.seed, budget) not in done for budget in job.budgets):
                made = _made(name, env, job, measure, steps, curves)
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


def beside_knapsack(run: Run, env: PruneEnv) -> CachedEvaluate:
    """The evaluation of a comparison: interleaved with the knapsack's plan, whose speed-up the table predicts."""
    reference = env.solved()
    return run.search.paired(reference, env.problem.table.predict_speedup(reference))


def compare_run(
    config: Path,
    run_dir: Path | None,
    overrides: Sequence[str],
    agents: Sequence[str],
    evaluations: Sequence[str],
    seeds: int,
    progress: Progress = SILENT,
) -> str:
    """`compare_all` on the task of a config, in a run directory; returns the tables.

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
        AGENTS.get(choice.name)
    loaded = load_config(config, [*overrides, "env.timing=table", f"env.actions={_ACTIONS}"])
    run = Run(loaded, run_dir or Path("runs") / f"{config.stem}-compare", progress=progress)
    progress.say(f"whatever the config says, trials are timed by the table, and the actions are {_ACTIONS}")
    env, log = run.search.env, OutcomeLog(run.directory / "outcomes.jsonl")
    measure = beside_knapsack(run, env)
    steps = run.context.choices.recovery.steps
    jobs, curves = jobs_of(choices, seeds, budgets), run.directory / "tensorboard"
    outcomes = compare_all(run.task.name, env, jobs, measure, log, progress, steps, curves)
    return report(outcomes, max(budgets))


def report(outcomes: Sequence[Outcome], evaluations: int) -> str:
    """The tables, with what their figures are."""
    cost = cost_table(outcomes)
    return (
        "Measured score above the knapsack's at the same measured speed-up, in points: interquartile mean over tasks "
        f"and seeds, 95% bootstrap interval.\n\n{summary_table(outcomes)}\n\nMeasured score, in points, after "
        f"{evaluations} evaluations:\n\n{task_table(outcomes, evaluations)}"
        + (f"\n\n{_COST}\n\n{cost}" if cost else "")
    )
