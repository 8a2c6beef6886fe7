"""Whether a policy that steers fine-tunings beats fixed schedules, on builds it never saw.

    autoprune train configs/steering.toml --run-dir runs/steering
    python -m benchmarks steering --policy runs/steering/policy      # goes on where it was stopped
    python -m benchmarks steering                                    # without a policy: fixed schedules alone
    python -m benchmarks steering --report

Each held-out task is put at the sparsity where the best of three fixed schedules (a cubic with uniform, ERK and LAMP
shares) loses 2 to 5 points on the validation split, by a training of a seed that nothing else has. Then every schedule
trains for as many steps, on the same batches, of the same seeds, and is judged on the test split: those three, the best
of them by validation, steering's zero action, and the policy. Writes benchmarks/results/steering.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from autoprune.envs.steer import FIXED, SteerProblem
from autoprune.files import cache_folder
from autoprune.pipeline.steering import SteeringSection, problem_at_stake
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from autoprune.tasks.steering import held_out_steering_members
from autoprune.training import TRAINING
from autoprune.training.steering_policy import SteeringPolicy
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Machines
from benchmarks.lib.sweep import Row, Rows, missing, seed_by_seed, sweep

OF = SteeringSection()
MEMBERS = {member.name: member for member in held_out_steering_members()}
ZERO, POLICY, BEST = "steered, zero action", "steered, policy", "best of the three by validation"
RESAMPLES = 10_000
FIRST_SEED = 100  # of the trainings: none that a policy learns on


@dataclass(frozen=True)
class SteeringRow(Row):
    """One training.

    Attributes:
        task: held out.
        seed: of the training, counted from 0.
        schedule: a fixed one, the zero action or the policy.
        policy: a digest of the policy's file; empty for others.
        sparsity: asked for.
        dense: test score of the dense model.
        validation: score after training.
        test: likewise.
    """

    task: str
    seed: int
    schedule: str
    policy: str
    sparsity: float
    dense: float
    validation: float
    test: float

    @property
    def key(self) -> Hashable:
        return (self.seed, self.task, self.schedule, self.policy)


@cache
def problem_of(task: str) -> SteerProblem | None:
    """The task at the sparsity where something is at stake; None where there is none."""
    return problem_at_stake(OF, MEMBERS[task], cache_folder() / "benchmarks" / "steering" / "targets.jsonl")


def digest_of(policy: Path | None) -> str:
    """Of a policy's numbers; empty without one."""
    if policy is None:
        return ""
    loaded = SteeringPolicy.load(policy)
    return sha256(b"".join(each.numpy().tobytes() for each in (*loaded.weights, *loaded.biases))).hexdigest()[:8]


def measure(point: tuple[int, str, str, str], policy: Path | None) -> SteeringRow:
    """Trains by one schedule and scores what it leaves."""
    seed, task, schedule, digest = point
    problem = problem_of(task)
    assert problem is not None
    choices = {**FIXED, ZERO: Choice("steered", {"slices": OF.slices})}
    if policy is not None:
        choices[POLICY] = Choice("steered", {"path": str(policy), "slices": OF.slices})
    model = problem.trained(TRAINING.create(choices[schedule]), OF.slices, OF.steps, FIRST_SEED + seed).model
    sparsity = next(iter(problem.plan.layers.values())).sparsity
    scored = problem.task
    return SteeringRow(
        task, seed, schedule, digest, sparsity, scored.test(problem.dense), scored.evaluate(model), scored.test(model)
    )


def with_best(rows: Sequence[SteeringRow]) -> dict[str, dict[tuple[str, int], float]]:
    """Schedule -> (task, seed) -> points lost on the test split, of those that all schedules have."""
    found: dict[str, dict[tuple[str, int], SteeringRow]] = {}
    for row in rows:
        found.setdefault(row.schedule, {})[row.task, row.seed] = row
    shared = set.intersection(*(set(each) for each in found.values())) if found else set()
    if not set(FIXED) <= found.keys():
        return {}
    chosen = {at: max((found[name][at] for name in FIXED), key=lambda row: row.validation) for at in shared}
    found = {**found, BEST: chosen}
    return {name: {at: 100 * (each[at].dense - each[at].test) for at in sorted(shared)} for name, each in found.items()}


def interval(values: Mapping[tuple[str, int], float]) -> tuple[float, float, float]:
    """The mean over tasks, and its 95% interval: tasks are drawn anew, and seeds within them (bootstrap)."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in values.items():
        by_task.setdefault(task, []).append(value)
    tasks, draws = [np.array(each) for each in by_task.values()], np.random.default_rng(0)
    means = [
        np.mean([draws.choice(tasks[i], len(tasks[i])).mean() for i in draws.integers(len(tasks), size=len(tasks))])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([each.mean() for each in tasks])), float(low), float(high)


def verdict(lost: Mapping[str, Mapping[tuple[str, int], float]]) -> str:
    """What the intervals say of the policy and the best single fixed schedule."""
    if POLICY not in lost:
        return "No policy was measured."
    rival = min(FIXED, key=lambda name: float(np.mean(list(lost[name].values()))))
    gained, low, high = interval({at: lost[rival][at] - value for at, value in lost[POLICY].items()})
    said = "beats" if low > 0 else "does not beat"
    return (
        f"The policy {said} the best single fixed schedule, `{rival}`: it loses {gained:.1f} [{low:.1f}, {high:.1f}] "
        "points less, paired by task and seed."
    )


def mean_of(task: str, values: Mapping[tuple[str, int], float]) -> str:
    """Of one task, as a cell."""
    return f"{np.mean([value for at, value in values.items() if at[0] == task]):.1f}"


def report(rows: Rows[SteeringRow], digest: str) -> str:
    """The page, of the rows that are there."""
    kept = [(row, made) for row, made in rows.read() if row.policy in ("", digest)]
    lost = with_best(list({row.key: row for row, _ in kept}.values()))
    machines, table, by_task = Machines([made for _, made in kept]), "", ""
    if lost and lost["lamp"]:
        cells = []
        for name, values in lost.items():
            mean, low, high = interval(values)
            paired = interval({at: lost["lamp"][at] - value for at, value in values.items()})
            against = "" if name == "lamp" else f"{paired[0]:+.1f} [{paired[1]:+.1f}, {paired[2]:+.1f}]"
            cells.append([name, f"{mean:.1f} [{low:.1f}, {high:.1f}]", against])
        table = markdown_table(("schedule", "points lost", "points above lamp, paired"), cells, left=1)
        tasks = sorted({task for task, _ in lost["lamp"]})
        sparsities = {row.task: f"{100 * row.sparsity:.1f}%" for row, _ in kept}
        means = [[task, sparsities[task], *(mean_of(task, each) for each in lost.values())] for task in tasks]
        by_task = markdown_table(("task", "sparsity", *lost), means, left=1)
    trainings = len(lost.get("lamp", {}))
    return page(
        "Steering against fixed schedules",
        "steering",
        f"Points that the test score is under the dense model's after {OF.slices * OF.steps} optimizer steps, over "
        f"{trainings} trainings (task and seed) of builds that no policy learned on; means over tasks and 95% "
        "bootstrap intervals over tasks and seeds. The best of the three by validation takes three trainings.",
        verdict(lost) if lost else "Nothing was measured.",
        table,
        by_task,
        machines.legend(),
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line("steering", __doc__)
    add_seeds(parser, 5)
    add_report(parser)
    parser.add_argument("--tasks", type=among(list(MEMBERS)), default=tuple(MEMBERS), help="held out; default all")
    parser.add_argument("--policy", type=Path, help="folder of a steering policy")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, digest = Rows(given.output / "steering.jsonl", SteeringRow), digest_of(given.policy)
    failed = 0
    try:
        if not given.report:
            tasks = [task for task in given.tasks if problem_of(task) is not None]
            schedules = [(name, "") for name in (*FIXED, ZERO)] + ([(POLICY, digest)] if digest else [])
            points = [(seed, task, *schedule) for seed, task, schedule in seed_by_seed(given.seeds, tasks, schedules)]
            failed = sweep(
                rows,
                missing(rows, points),
                lambda point: measure(point, given.policy),
                Console(),
                note=lambda row: f"{100 * (row.dense - row.test):.1f} points lost",
            )
    finally:
        write_page(given.output, "steering", report(rows, digest))
    return 1 if failed else 0
