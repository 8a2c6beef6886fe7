"""A generalist: one policy for many models, trained on a family of tasks and judged on others.

Stages, each kept in the directory: every task gets a dense model, a latency table, sensitivity curves, and plans that
are really evaluated; a surrogate of each task is fitted to those; the policy learns, mostly on surrogates.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from autoprune.agents import AGENTS
from autoprune.agents.base import Actor
from autoprune.agents.checkpoint import checkpoint_episodes
from autoprune.agents.family import FamilyLearner, Update, advantage_of
from autoprune.agents.sb3 import SB3Agent
from autoprune.config import GeneralistConfig, check_directory, parse_config
from autoprune.documents import parsed
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.family import FamilyEnv, TaskTarget, speedup_at, task_targets_of
from autoprune.envs.knapsack import weighed
from autoprune.envs.surrogate import Surrogate, fit_surrogate
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.measurement import Evaluate, Measurement
from autoprune.evaluation.pool import cores
from autoprune.files import append_line, cache_folder, keep_lines, read_lines, write_json
from autoprune.latency.machine import machine_identity
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.processes.locks import FolderLock
from autoprune.processes.workers import Workers
from autoprune.progress import SILENT, Progress
from autoprune.report.tensorboard import FamilyWriter
from autoprune.target import Target
from autoprune.tasks.family import Member, draw_members, held_out_members

CHOOSING = 5  # one in five tasks of the family chooses among the policies of one training; no policy learns from it
_WIDTH = 0.8  # of the coefficients' logs, of the plans a surrogate is fitted to
_OF_TASKS = frozenset(
    {"pattern", "criterion", "max_sparsity", "keep_dense", "min_weights", "min_saving", "recovery", "timing"}
)  # of the environment's settings, those that a task's making depends on
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_ASKED = Target(speedup=2.0, over="eager")  # of a task's run; its task targets have their own


@dataclass(frozen=True, eq=False)
class FamilyTask:
    """A task of the family, ready for episodes.

    Attributes:
        task_targets: its targets; none when pruning it decides nothing.
        surrogate: of its evaluation.
    """

    name: str
    problem: Problem
    task_targets: tuple[TaskTarget, ...]
    surrogate: Surrogate


@dataclass(frozen=True)
class Judgement:
    """How much better than the solver's a policy's plans are: mean advantage over tasks (`envs.family`), by surrogates.

    Attributes:
        update: after which, counted from 0.
        learned: tasks it learns from.
        choosing: drawn tasks it does not learn from; the best here is kept.
        held_out: tasks of other builds, that nothing is chosen by.
    """

    update: int
    learned: float
    choosing: float
    held_out: float


class Generalist:
    """The stages of one training over a family.

    Args:
        config: what to do.
        directory: where everything is kept; that of another config is refused.
        workers: tasks made ready at a time, a process each; None: one a core.
        prepared: all tasks with something at stake, by name, as another training of this family made them; None: they
            are made, or loaded, here.
    """

    def __init__(
        self,
        config: GeneralistConfig,
        directory: Path,
        *,
        progress: Progress = SILENT,
        workers: int | None = None,
        prepared: Mapping[str, FamilyTask] | None = None,
    ) -> None:
        self.config, self.directory, self.progress = config, directory, progress
        self._given = prepared
        self._workers = cores() if workers is None else workers
        self._judging: dict[str, list[PruneEnv]] = {}
        self._runs: dict[str, Run] = {}
        self._lock = FolderLock(directory)
        with self._lock.or_in_use():
            check_directory(directory, config.to_json())

    @cached_property
    def members(self) -> tuple[Member, ...]:
        family = self.config.family
        return draw_members(family.tasks, self.config.seed, family.data)

    @cached_property
    def judges(self) -> tuple[Member, ...]:
        """The tasks that are held out."""
        return held_out_members(self.config.family.data)

    def run_of(self, member: Member) -> Run:
        """The run that keeps what a task needs; its directory, once it is written in, is this training's for life."""
        if member.name not in self._runs:
            self._runs[member.name] = member_run(self.config, member)
        return self._runs[member.name]

    @cached_property
    def prepared(self) -> Mapping[str, FamilyTask]:
        """All tasks with something at stake, drawn and held out, by name."""
        return self._prepare_all() if self._given is None else self._given

    def _prepare_all(self) -> dict[str, FamilyTask]:
        """Loads the tasks; what is missing is made before, a process each."""
        self._lock.take()
        write_json(self.directory / "config.json", self.config.to_json())
        everyone = [*self.members, *self.judges]
        missing = [member for member in everyone if not (self._done(member)).exists()]
        with self.progress.bar("tasks", len(everyone)) as bar:
            bar.advance(len(everyone) - len(missing))
            prepare = partial(_prepare, self.config)
            if min(len(missing), self._workers) < 2:
                for member in missing:
                    prepare(member)
                    bar.advance(1, member.name)
            else:
                workers = Workers(prepare, self._workers, named=lambda member: member.name)
                with closing(workers):
                    for index, _ in workers.as_done(missing):
                        bar.advance(1, missing[index].name)
        found = {member.name: self._load(member) for member in everyone}
        for name, each in found.items():
            if not each.task_targets:
                self.progress.say(f"  {name:<28} is left out: pruning it decides too little, or breaks it at once")
        return {name: each for name, each in found.items() if each.task_targets}

    def _done(self, member: Member) -> Path:
        return self.run_of(member).directory / "prepared.json"

    def _load(self, member: Member) -> FamilyTask:
        problem = self.run_of(member).problem
        plans = surrogate_plans(problem, self.config.family.plans, self.config.seed)
        tried = [(plan, problem.evaluate(plan)) for plan in plans]
        scored = [(plan, each.score) for plan, each in tried if isinstance(each, Measurement)]
        surrogate = fit_surrogate(problem, [plan for plan, _ in scored], [score for _, score in scored])
        self.progress.say(
            f"  {member.name:<28} {len(problem.inventory.layers):>2} layers, {speedup_at(problem, 0.0):.2f}x to "
            f"{speedup_at(problem, 1.0):.2f}x, surrogate off by {100 * surrogate.error:.1f} points (rank "
            f"{surrogate.rank:.2f})"
        )
        return FamilyTask(
            member.name,
            problem,
            tuple(task_targets_of(member.name, problem, drops=self.config.family.drops)),
            surrogate,
        )

    def split(self) -> tuple[list[FamilyTask], list[FamilyTask], list[FamilyTask]]:
        """The tasks that are learned from, those that choose, and those held out.

        Raises:
            AutopruneError: a part is empty.
        """
        learned: list[FamilyTask] = []
        choosing: list[FamilyTask] = []
        for index, member in enumerate(self.members):
            if member.name in self.prepared:
                (choosing if _chooses(index) else learned).append(self.prepared[member.name])
        held_out = [self.prepared[member.name] for member in self.judges if member.name in self.prepared]
        if not learned or not choosing or not held_out:
            raise AutopruneError(
                f"the family has {len(learned) + len(choosing)} tasks with something at stake and {len(held_out)} held "
                f"out: {CHOOSING} and 1 at least are needed. Draw more tasks (family.tasks), or allow a higher "
                "env.max_sparsity."
            )
        return learned, choosing, held_out

    def learner(self, learned: Sequence[FamilyTask]) -> FamilyLearner:
        config, env = self.config, self.config.env
        task_targets = all_task_targets(learned)
        cheap = {each.name: each.surrogate for each in learned}

        family = FamilyEnv(
            task_targets,
            env.actions,
            cheap,
            measured_share=config.learning.measured_share,
            curves=env.curves,
            start=env.start,
            shaping=env.shaping,
            gamma=env.gamma,
        )
        agent = AGENTS.create(config.agent)
        if not isinstance(agent, SB3Agent):
            raise ConfigError(f"agent {config.agent.name!r} learns no policy: a generalist needs one that does.")
        return FamilyLearner(agent, family, config.learning.envs, config.seed)

    def train(self) -> Judgement:
        """Learns, or goes on learning; the policy that the choosing tasks like best is kept in ``policy``."""
        self._lock.take()
        learned, choosing, held_out = self.split()
        learner = self.learner(learned)
        updates, every = self.config.learning.updates, self.config.learning.judge_every
        judgements = parsed(list[Judgement], read_lines(self._judged, "the judgements"))
        done = checkpoint_episodes(self.directory)
        judgements = [each for each in judgements if each.update < done]
        keep_lines(self._judged, len(judgements))  # what was learned after the checkpoint is learned again
        writer = FamilyWriter(self.directory / "tensorboard", done)
        with self.progress.bar("learning", updates) as bar:
            bar.advance(done)

            def seen(update: Update) -> None:
                writer.update(update.index, update.advantages, update.surrogate_errors)
                said = ""
                if (update.index + 1) % every == 0 or update.index + 1 == updates:
                    judgement = Judgement(
                        update.index,
                        *(self._judge(learner.act, part) for part in (learned, choosing, held_out)),
                    )
                    if not judgements or judgement.choosing > max(each.choosing for each in judgements):
                        learner.save_policy(self.directory / "policy")
                    judgements.append(judgement)
                    append_line(self._judged, asdict(judgement))
                    writer.judgement(update.index, judgement.learned, judgement.choosing, judgement.held_out)
                    said = f"advantage {judgement.learned:+.3f}, choosing {judgement.choosing:+.3f}"
                bar.advance(1, said)

            try:
                learner.learn(updates, self.directory, seen)
            finally:
                writer.close()
        return max(judgements, key=lambda each: each.choosing)

    @property
    def _judged(self) -> Path:
        return self.directory / "judgements.jsonl"

    def _judge(self, act: Actor, tasks: Sequence[FamilyTask]) -> float:
        """Mean advantage of a policy's plans over tasks, by their surrogates: each task counts alike."""
        means = []
        for each in tasks:
            if each.name not in self._judging:
                self._judging[each.name] = [
                    self._environment(task_target, each.surrogate) for task_target in each.task_targets
                ]
            means.append(float(np.mean([advantage_of(act, env) for env in self._judging[each.name]])))
        return float(np.mean(means))

    def _environment(self, task_target: TaskTarget, evaluate: Evaluate) -> PruneEnv:
        env = self.config.env
        problem = replace(task_target.problem, evaluate=evaluate)
        return PruneEnv(problem, env.actions, env.shaping, env.gamma, env.start, env.curves)


def member_run(config: GeneralistConfig, member: Member) -> Run:
    """The run of one task, in the user's cache: what is made ready once serves every training and comparison.

    Its config holds what a task's making depends on, and no more: not what an agent may choose or see.
    """
    env = config.env.model_dump(mode="json", include=set(_OF_TASKS))
    parsed = parse_config(
        {
            "seed": config.seed,
            "task": {"name": member.task.name, **member.task.args},
            "dense": member.dense.to_json(),
            "target": _ASKED.to_json(),
            "latency": config.latency.model_dump(mode="json"),
            "env": {"actions": ["coefficient"], **env},
            "search": {"rules": False},
        },
        member.name,
    )
    made = {"config": parsed.to_json(), "machine": machine_identity()}  # its table and trials are good for no other one
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
    return Run(parsed, cache_folder() / "family" / f"{member.name}-{digest}")


def _prepare(config: GeneralistConfig, member: Member) -> None:
    """Makes all that a task needs and leaves it in its run's directory; runs in a process of its own."""
    torch.set_num_threads(1)
    _keep_memory()
    run = member_run(config, member)
    with closing(run.lock):
        problem = run.problem
        problem.evaluate.all(surrogate_plans(problem, config.family.plans, config.seed))
        task_targets = task_targets_of(member.name, problem, drops=config.family.drops)
        write_json(
            run.directory / "prepared.json", {"task_targets": [task_target.fraction for task_target in task_targets]}
        )


def _keep_memory() -> None:
    """Has glibc keep what torch frees: else every batch's pages are faulted in anew, a third of a small CNN's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 1 << 30)


def surrogate_plans(problem: Problem, count: int, seed: int) -> list[Plan]:
    """Plans of all speeds, each the solver's under random coefficients."""
    draws = np.random.default_rng(seed)
    plans = []
    for _ in range(count):
        aimed = problem.at(speedup_at(problem, float(draws.uniform(0.1, 0.95))))
        logs = np.clip(_WIDTH * draws.standard_normal(len(problem.inventory.layers)), -2.0, 2.0)
        plans.append(weighed(aimed, np.exp(logs)))
    return plans


def _chooses(index: int) -> bool:
    """One of every `CHOOSING` tasks, another one each time: kinds of models come in turn, and all must choose."""
    return (index + index // CHOOSING) % CHOOSING == CHOOSING - 1


def all_task_targets(prepared: Sequence[FamilyTask]) -> list[TaskTarget]:
    return [task_target for each in prepared for task_target in each.task_targets]
