"""How long a plan takes: ResNet-50 at 224, table from the cache. Some minutes the first time, one after that.

    python -m benchmarks planning

The table is measured once and kept. Timed is all that a user waits for after that: reading the table, the inventory,
the sensitivity probe and the plan; then the steps of the environment alone. Writes benchmarks/results/planning.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from autoprune.agents.policy import SHIPPED, Policy
from autoprune.config import parse_config
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.family import speedup_at
from autoprune.evaluation.measurement import Evaluate, Measurement
from autoprune.files import cache_folder
from autoprune.latency.table import LatencyTable
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from autoprune.tasks.base import Task
from autoprune.tasks.batches import TensorBatches
from autoprune.tasks.zoo import MODELS
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

CALIBRATION = 16
STEPS = 20_000


def resnet50_task() -> Task:
    torch.manual_seed(0)
    model = MODELS.create(Choice("resnet50")).eval()
    x, y = torch.randn(CALIBRATION, 3, 224, 224), torch.randint(1000, (CALIBRATION,))
    batches = tuple(TensorBatches(x, y, 8))
    return Task("resnet50", model, batches, batches, batches, batches, functional.cross_entropy, None)


def planned(directory: Path, policy: Policy) -> tuple[dict[str, float], Plan, PruneEnv]:
    """Seconds of each stage from the cached table on, and the plan."""
    (directory / "sensitivity.json").unlink(missing_ok=True)
    seconds: dict[str, float] = {}
    ticks = [time.perf_counter()]

    def stage(name: str) -> None:
        ticks.append(time.perf_counter())
        seconds[name] = ticks[-1] - ticks[-2]

    run = Run(parse_config(CONFIG, "planning"), directory, task=resnet50_task())
    stage("model and data")
    _ = run.preparation.offered
    stage("inventory and table")
    problem = run.problem
    stage("sensitivity probe")
    problem = aimed(problem)
    env = PruneEnv(problem, policy.actions, start=policy.start, shaping=0.0)
    observation, _ = env.reset()
    info: dict[str, Any] = {}
    over, step = False, 0
    while not over:
        observation, _, over, _, info = env.step(policy.act(observation, step))
        step += 1
    stage("policy")
    return seconds, Plan.from_json(info["trial"]["plan"]), env


def aimed(problem: Problem) -> Problem:
    """Half way to the fastest plan, and nothing evaluated: a plan is what is timed."""
    return replace(problem.at(speedup_at(problem, 0.5)), evaluate=Unscored(problem.table))


@dataclass(frozen=True)
class Unscored(Evaluate):
    """Nothing is evaluated."""

    table: LatencyTable

    def __call__(self, plan: Plan) -> Measurement:
        return Measurement(0.0, self.table.predict_ms(plan), self.table.predict_speedup(plan))


CONFIG = {
    "task": "given",
    "target": {"speedup": 2.0},
    "env": {"actions": ["mix", "coefficient"], "max_sparsity": 0.98, "timing": "table"},
    "latency": {"profile_samples": 5},
}


def steps_a_second(env: PruneEnv) -> float:
    draws = np.random.default_rng(0)
    env.reset()
    started = time.perf_counter()
    for _ in range(STEPS):
        *_, over, _, _ = env.step(draws.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32))
        if over:
            env.reset()
    return STEPS / (time.perf_counter() - started)


def main(argv: Sequence[str]) -> int:
    given = command_line("planning", __doc__).parse_args(argv)
    directory, policy = cache_folder() / "benchmarks" / "planning", Policy.load(SHIPPED)
    started = time.perf_counter()
    _ = Run(parse_config(CONFIG, "planning"), directory, task=resnet50_task(), progress=Console()).preparation.table
    first = time.perf_counter() - started
    seconds, plan, env = planned(directory, policy)
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    rows.append(["all", f"{sum(seconds.values()):.2f}"])
    text = page(
        "Planning for ResNet-50 at 224",
        "planning",
        f"{len(plan.layers)} layers, batch 1, {CALIBRATION} calibration images, {torch.get_num_threads()} threads.",
        markdown_table(("stage", "seconds"), rows, left=1),
        f"The table took {first:.0f} s in this run (measured once, or read). The environment of this model: "
        f"{env.steps_per_episode} steps an episode, nothing evaluated: {steps_a_second(env):,.0f} steps a second.",
        str(Provenance.here()),
    )
    write_page(given.output, "planning", text)
    return 0
