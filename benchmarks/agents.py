"""Who plans best: the shipped policy and its rivals on tasks of builds it never saw. Hours on two cores.

    python -m benchmarks agents                              # goes on where it was stopped
    python -m benchmarks agents --tasks fashion-vgg --seeds 1
    python -m benchmarks agents --no-finetune                # two hours: plans are judged before training alone
    python -m benchmarks agents --report                     # write the page of what is there already

Every task has one target: of those at which the knapsack's plan costs something, the one where it costs nearest to 5
points. Searches score plans on the validation split after batch norms are set again; what is reported is each best
plan repacked, timed in turns with the knapsack's, moved until it is as fast, and scored there. The plans after the last
number of evaluations are then fine-tuned alike and judged by the test score, and every cheaper score by how well it
foretells that one. Writes benchmarks/results/agents.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from autoprune.config import load_generalist_config
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.family import TaskTarget, task_targets_of
from autoprune.evaluation.measurement import Measurement
from autoprune.files import read_json, write_json
from autoprune.pipeline.compare import Job, TaskComparison, jobs_of
from autoprune.pipeline.compare import report as tables
from autoprune.pipeline.generalist import member_run
from autoprune.pipeline.judgement import Judgement
from autoprune.pipeline.outcomes import FIVE_RECIPES, Outcome, OutcomeLog, interquartile_mean, interval, points_above
from autoprune.pipeline.yardstick import CheapScoreLog, TrainedLog
from autoprune.registry import Choice
from autoprune.tasks.family import held_out_members
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line, listed
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import NOT_RECORDED, Provenance

CONFIG = Path(__file__).parents[1] / "configs" / "generalist.toml"
PROVENANCE = "provenance.json"  # of the last time that anything was measured; outcomes do not say theirs
COEFFICIENT = (Choice("coefficient"),)
ALL = ("uniform", "greedy", "knapsack", "random", "restarts", "tpe", "cma_es", "evopress", "policy", FIVE_RECIPES)
BUDGETS = (0, 1, 10, 50)
REFERENCE = ("restarts", "cma_es", "policy")  # the best plan known is looked for by one seed of these
RANDOM = 100  # evaluations of random search besides
ASKED_DROP = 0.05  # of the knapsack's plan


def jobs(agents: Sequence[str], seeds: int, budgets: Sequence[int], most: int) -> list[Job]:
    choices = [Choice(name) for name in agents]
    listed = jobs_of(choices, seeds, budgets)
    listed = [replace(job, budgets=(*job.budgets, RANDOM)) if job.agent.name == "random" else job for job in listed]
    return listed + [Job(Choice(name), 0, (most,)) for name in REFERENCE if name in agents and most > max(budgets)]


def task_target_of(name: str, problem: Problem) -> TaskTarget | None:
    """Of the targets with something at stake, the one whose knapsack's plan costs nearest to `ASKED_DROP`."""

    def off(task_target: TaskTarget) -> float:
        plan = PruneEnv(task_target.problem, COEFFICIENT).solved()
        found = problem.evaluate(plan)
        return abs(problem.dense_score - found.score - ASKED_DROP) if isinstance(found, Measurement) else inf

    return min(task_targets_of(name, problem), key=off, default=None)


def run_task(
    name: str, folder: Path, agents: Sequence[str], seeds: int, budgets: Sequence[int], most: int, finetune: bool
) -> str:
    torch.set_num_threads(1)
    config = load_generalist_config(CONFIG)
    run = member_run(config, next(each for each in held_out_members(config.family.data) if each.name == name))
    task_target = task_target_of(name, run.problem)
    if task_target is None:
        return f"{name}: nothing at stake"
    env = PruneEnv(task_target.problem, config.env.actions, shaping=0.0)
    comparison = TaskComparison(name, run, env, OutcomeLog(folder / f"{name}.jsonl"), folder / name)
    asked = jobs(agents, seeds, budgets, most)
    judged = comparison.hold(asked, finetune=finetune, evaluations=max(budgets))
    base = next((each.score for each in judged.outcomes if each.agent == "knapsack"), float("nan"))
    target, dense = task_target.problem.target.speedup, run.prepared.dense_score
    return f"{name}: done, target {target:.2f}x, dense {dense:.4f}, knapsack {base:.4f}"


def wins(outcomes: list[Outcome]) -> str:
    """On how many tasks the policy's plan, made without an evaluation, scores above a rival's."""
    lines = []
    for rival, evaluations in (("uniform", 0), ("greedy", 0), ("knapsack", 0), ("random", 100)):
        above = tied = tasks = 0
        for task in sorted({each.task for each in outcomes}):
            mine = mean(outcomes, task, "policy", 0)
            theirs = mean(outcomes, task, rival, evaluations)
            if np.isnan(mine) or np.isnan(theirs):
                continue
            tasks, above, tied = tasks + 1, above + (mine > theirs), tied + (mine == theirs)
        after = f"after {evaluations} evaluations" if evaluations else "without an evaluation"
        lines.append(f"- {rival} {after}: better on {above} of {tasks} tasks, equal on {tied}")
    return "\n".join(lines)


def mean(outcomes: list[Outcome], task: str, agent: str, evaluations: int) -> float:
    scores = [e.score for e in outcomes if (e.task, e.agent, e.evaluations) == (task, agent, evaluations)]
    return float(np.mean(scores)) if scores else float("nan")


def gap_to_best(outcomes: list[Outcome]) -> str:
    """How far the policy is, zero-shot and after 50 evaluations, from the best plan anyone found."""
    rows = []
    for task in sorted({each.task for each in outcomes}):
        best = max(each.score for each in outcomes if each.task == task)
        zero, fifty = (100 * (best - mean(outcomes, task, "policy", budget)) for budget in (0, 50))
        rows.append(f"- {task}: {zero:.2f} points zero-shot, {fifty:.2f} after 50 evaluations")
    return "\n".join(rows)


def picture(outcomes: list[Outcome], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for agent in dict.fromkeys(each.agent for each in outcomes):
        budgets = sorted({each.evaluations for each in outcomes if each.agent == agent and each.evaluations <= 100})
        centre, low, high = [], [], []
        for budget in budgets:
            by_task = points_above(outcomes, agent, budget)
            centre.append(interquartile_mean([value for values in by_task.values() for value in values]))
            bounds = interval(by_task)
            low.append(bounds[0])
            high.append(bounds[1])
        line = axes.plot([max(0.5, b) for b in budgets], centre, marker="o", label=agent)[0]
        axes.fill_between([max(0.5, b) for b in budgets], low, high, alpha=0.15, color=line.get_color())
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=2)
    axes.set_xticks([0.5, 1, 10, 50, 100], ["0", "1", "10", "50", "100"])
    axes.set_xlabel("evaluations")
    axes.set_ylabel("points of accuracy above the knapsack")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(folder: Path, evaluations: int) -> str:
    """Draws the picture and returns the page, from what is in ``agents/``."""
    kept = folder / "agents"
    outcomes = [each for path in sorted(kept.glob("*.jsonl")) for each in OutcomeLog(path).read()]
    trained = [each for path in sorted(kept.glob("*/trained.jsonl")) for each in TrainedLog(path).read()]
    scores = [each for path in sorted(kept.glob("*/scores.jsonl")) for each in CheapScoreLog(path).read()]
    picture(outcomes, folder / "agents.png")
    seconds = {
        agent: np.median([e.seconds for e in outcomes if e.agent == agent and e.evaluations == 50])
        for agent in ("random", "restarts", "tpe", "cma_es", "policy")
        if any(e.agent == agent and e.evaluations == 50 for e in outcomes)
    }
    made = kept / PROVENANCE
    where = Provenance(**read_json(made, "the provenance")) if made.exists() else f"Machine: {NOT_RECORDED}."
    return page(
        "Agents at equal evaluations",
        "agents",
        f"{len({e.task for e in outcomes})} tasks of builds the policy never saw; batch 1, 1 thread, CPU.",
        tables(Judgement(outcomes, evaluations, trained, scores)),
        "![points above the knapsack](agents.png)",
        "The policy's plan without an evaluation against",
        wins(outcomes),
        "Below the best plan anyone found, with up to as many evaluations as any had:",
        gap_to_best(outcomes),
        "Seconds of a search of 50 evaluations, median, evaluations remembered from other searches not counted: "
        + ", ".join(f"{agent} {value:.0f}" for agent, value in seconds.items()),
        str(where),
    )


def main(argv: Sequence[str]) -> int:
    names = [member.name for member in held_out_members(load_generalist_config(CONFIG).family.data)]
    parser = command_line("agents", __doc__)
    parser.add_argument("--tasks", type=among(names), default=names, help=f"of {', '.join(names)}; default all")
    parser.add_argument("--agents", type=among(ALL), default=ALL, help=f"of {', '.join(ALL)}; default all")
    add_seeds(parser, 3)
    parser.add_argument("--evaluations", type=listed(int), default=BUDGETS, help="checkpoints; default 0,1,10,50")
    parser.add_argument(
        "--reference", type=int, default=300, help="evaluations of the best plan known; 0: not looked for"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--finetune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether plans are judged after training, too; default yes",
    )
    add_report(parser)
    given = parser.parse_args(argv)
    if not given.report:
        folder = given.output / "agents"
        settings = (folder, given.agents, given.seeds, given.evaluations, given.reference, given.finetune)
        write_json(folder / PROVENANCE, Provenance.here().to_json())
        with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(run_task, name, *settings) for name in given.tasks]):
                print(done.result(), flush=True)
    write_page(given.output, "agents", report(given.output, max(given.evaluations)))
    return 0
