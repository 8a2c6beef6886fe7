"""Training of a steering policy: small tasks, each at a target where something is at stake, learned on by PPO.

One task in five is not learned on: it chooses which policy is kept. Tasks of other builds are judged by
`python -m benchmarks steering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from autoprune.agents import AGENTS
from autoprune.agents.checkpoint import checkpoint_episodes
from autoprune.agents.ppo import PPOAgent
from autoprune.agents.steering import SteeringLearner, SteeringUpdate, advantage_of
from autoprune.config import ChoiceField, Count, Root, Section, check_directory
from autoprune.documents import parsed
from autoprune.envs.steer import STEPS, SteerEnv, SteerProblem
from autoprune.errors import AutopruneError, ConfigError
from autoprune.files import append_line, keep_lines, read_lines, write_json
from autoprune.latency.timer import torch_threads
from autoprune.pipeline.steer_problems import GROUP, LEAST, MOST, at_sparsity, at_stake, steer_problem
from autoprune.plan import LayerPlan
from autoprune.processes.locks import FolderLock
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.tasks.family import Member
from autoprune.tasks.steering import draw_steering_members
from autoprune.training.steering import SLICES
from autoprune.training.steering_policy import MOST_SLICES

CHOOSING = 5  # one in so many tasks chooses among the policies of one training
JUDGED_SEED = 10_000  # of the trainings that choose: none that are learned on


class SteeringSection(Section):
    """The tasks that steering is learned on, and their trainings."""

    tasks: Annotated[int, Field(ge=CHOOSING)] = 15  # drawn; one in five chooses among policies
    slices: Annotated[int, Field(ge=1, le=MOST_SLICES)] = SLICES  # of a training, each an order of the policy
    steps: Count = STEPS  # optimizer steps of a slice
    seeds: Count = 4  # trainings of each task, whose fixed schedules are trained once
    shaping: Annotated[float, Field(ge=0.0)] = 0.1
    pattern: ChoiceField = GROUP
    criterion: ChoiceField = Choice("magnitude")


class SteeringLearning(Section):
    """How the policy learns."""

    updates: Count = 60
    envs: Count = 8  # episodes side by side
    judge_every: Count = 5  # updates between two judgements of the policy
    judged_seeds: Count = 2  # trainings of each choosing task in a judgement


class SteeringConfig(Root):
    """Training of a steering policy; each section's comments say what a key means."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steering: SteeringSection
    agent: ChoiceField = Choice("ppo", {"episodes_per_update": 2, "learning_rate": 1e-3, "net": [64, 64]})
    learning: SteeringLearning = SteeringLearning()


@dataclass(frozen=True)
class AtStake:
    """A task's target, as it was found; a sparsity of 0 where nothing is at stake at any."""

    name: str
    sparsity: float
    lost: float


@dataclass(frozen=True)
class SteeringJudgement:
    """Mean advantage over the best fixed schedule, in units of what that loses, of a policy's mean actions.

    Attributes:
        update: after which, counted from 0.
        learned: of the episodes of that update, whose actions vary.
        choosing: of the tasks that choose; the best here is kept.
    """

    update: int
    learned: float
    choosing: float


class SteeringTraining:
    """The stages of one training, each kept in the directory.

    Args:
        config: what to do.
        directory: where everything is kept; that of another config is refused.
        progress: where long work is shown.
    """

    def __init__(self, config: SteeringConfig, directory: Path, *, progress: Progress = SILENT) -> None:
        self.config, self.directory, self.progress = config, directory, progress
        self._lock = FolderLock(directory)
        with self._lock.or_in_use():
            check_directory(directory, config.to_json())

    @cached_property
    def problems(self) -> tuple[list[SteerProblem], list[SteerProblem]]:
        """Those that are learned on, and those that choose.

        Raises:
            AutopruneError: a part is empty.
        """
        members = draw_steering_members(self.config.steering.tasks, self.config.seed)
        parts: tuple[list[SteerProblem], list[SteerProblem]] = [], []
        with self.progress.bar("tasks", len(members)) as bar:
            for index, member in enumerate(members):
                problem = problem_at_stake(self.config.steering, member, self.directory / "targets.jsonl")
                if problem is not None:
                    parts[index % CHOOSING == CHOOSING - 1].append(problem)
                bar.advance(1, member.name)
        if not parts[0] or not parts[1]:
            raise AutopruneError(
                f"{len(parts[0])} tasks to learn on and {len(parts[1])} to choose by have a target at which the best "
                f"fixed schedule loses {100 * LEAST:g} to {100 * MOST:g} points: draw more (steering.tasks)."
            )
        return parts

    def train(self) -> SteeringJudgement:
        """Learns, or goes on learning; the policy that the choosing tasks like best is kept in ``policy``."""
        agent = AGENTS.create(self.config.agent)
        if not isinstance(agent, PPOAgent) or agent.name != "ppo":
            raise ConfigError(f"steering is learned by the agent 'ppo', not {self.config.agent.name!r}.")
        self._lock.take()
        write_json(self.directory / "config.json", self.config.to_json())
        with torch_threads(1):
            learned, choosing = self.problems
            envs = [self._environment(learned) for _ in range(self.config.learning.envs)]
            return self._learn(SteeringLearner(agent, envs, self.config.seed), self._environment(choosing))

    def _learn(self, learner: SteeringLearner, judging: SteerEnv) -> SteeringJudgement:
        learning, path = self.config.learning, self.directory / "judgements.jsonl"
        done = checkpoint_episodes(self.directory)
        judgements = [
            each for each in parsed(list[SteeringJudgement], read_lines(path, "the judgements")) if each.update < done
        ]
        keep_lines(path, len(judgements))  # what was learned after the checkpoint is learned again
        with self.progress.bar("learning", learning.updates) as bar:
            bar.advance(done)

            def seen(update: SteeringUpdate) -> None:
                mean = float(np.mean(update.advantages))
                said = f"advantage {mean:+.2f}"
                if (update.index + 1) % learning.judge_every == 0 or update.index + 1 == learning.updates:
                    judgement = SteeringJudgement(update.index, mean, self._judge(learner, judging))
                    if not judgements or judgement.choosing > max(each.choosing for each in judgements):
                        learner.policy.save(self.directory / "policy")
                    judgements.append(judgement)
                    append_line(path, asdict(judgement))
                    said += f", choosing {judgement.choosing:+.2f}"
                bar.advance(1, said)

            learner.learn(learning.updates, self.directory, seen)
        return max(judgements, key=lambda each: each.choosing)

    def _judge(self, learner: SteeringLearner, env: SteerEnv) -> float:
        policy, seeds = learner.policy, range(JUDGED_SEED, JUDGED_SEED + self.config.learning.judged_seeds)
        found = [advantage_of(policy, env, index, seed) for index in range(len(env.problems)) for seed in seeds]
        return float(np.mean(found))

    def _environment(self, problems: Sequence[SteerProblem]) -> SteerEnv:
        of = self.config.steering
        return SteerEnv(problems, of.slices, of.steps, of.seeds, of.shaping)


def problem_at_stake(of: SteeringSection, member: Member, known: Path) -> SteerProblem | None:
    """A task at the sparsity where something is at stake; None where there is none. `known` holds what was found."""
    layer = LayerPlan(0.0, of.pattern, of.criterion)
    problem = steer_problem(member.name, member.task, layer, dense=member.dense.to_json())
    found = {each.name: each for each in parsed(list[AtStake], read_lines(known, "the targets"))}
    if member.name not in found:
        sparsity, lost = at_stake(problem, of.slices, of.steps) or (0.0, 0.0)
        found[member.name] = AtStake(member.name, sparsity, lost)
        append_line(known, asdict(found[member.name]))
    target = found[member.name]
    return replace(at_sparsity(problem, target.sparsity), stake=target.lost) if target.sparsity else None
