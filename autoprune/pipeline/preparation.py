"""What a run knows before it searches: the task, the dense model, its prunable layers, and their measured times."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from autoprune.agents import AGENTS
from autoprune.config import Config, check_directory, flat
from autoprune.criteria import CRITERIA
from autoprune.envs.actions import ACTIONS, ActionComponent
from autoprune.envs.actions.criterion import CriterionChoice
from autoprune.envs.actions.group_size import GroupSize
from autoprune.errors import ConfigError
from autoprune.evaluation.dense import check_reseedable, dense_model
from autoprune.evaluation.pool import cores
from autoprune.evaluation.profile import profile_record, profile_settings, profile_table, worth_pruning
from autoprune.evaluation.recovery import RECOVERIES, Subject
from autoprune.files import write_json
from autoprune.identity.claim import Claim, task_parts
from autoprune.identity.fingerprint import model_fingerprints
from autoprune.latency.engines import ENGINES
from autoprune.latency.machine import machine_identity
from autoprune.latency.quiet import timing
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Clock, Protocol, torch_threads
from autoprune.masks import collect_statistics
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.patterns import PATTERNS
from autoprune.processes.locks import FolderLock
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.repack.kernels.compiler import refused
from autoprune.tasks import TASKS, Task
from autoprune.training import TRAINING


def check_names(config: Config, task_given: bool = False) -> None:
    """Raises ConfigError when the config names a row no registry has, or choices that do not go together."""
    PATTERNS.create(config.env.pattern)
    CRITERIA.create(config.env.criterion)
    TRAINING.create(config.finetune.method)
    recovery = RECOVERIES.create(config.env.recovery)
    for engine in config.latency.engines:
        ENGINES.get(engine)
    for choice in config.env.actions:
        component = ACTIONS.create(choice)
        if component.needs_training and not recovery.trains:
            raise ConfigError(
                f"the action {choice.name!r} would never reach the reward: recovery {config.env.recovery.name!r} does "
                'not train. Set env.recovery = {name = "train", steps = 20}, or drop the action.'
            )
    if not task_given:
        TASKS.get(config.task.name)
    check_teachers(config, task_given)
    AGENTS.create(config.search.agent)


def check_teachers(config: Config, task_given: bool = False) -> None:
    """Raises ConfigError when more teachers than the dense model are asked for that cannot be had, or not be heard."""
    finetune = config.finetune
    if finetune.teachers == 1:
        return
    if task_given:
        raise ConfigError("finetune.teachers must be 1 for a task that is given: it has the one model.")
    check_reseedable(config.task)
    if finetune.settings.distillation_weight == 0 and all(
        choice.name != "distillation" for choice in config.env.actions
    ):
        raise ConfigError(
            f"finetune.teachers is {finetune.teachers}, but nothing is distilled from them: set "
            "finetune.settings.distillation_weight above 0, or finetune.teachers to 1."
        )


class Preparation:
    """The stages up to the latency table. Each property does its stage, and those before it, once.

    Args:
        config: what to do.
        directory: where everything is written; a directory of another config, model, data or function is refused.
        task: in place of the task the config names.
        fresh_table: measure the latency table again even if there is one.
        workers: processes that evaluate trials, which change no result; None: one a core.
        ray: in their place, the address of a Ray cluster: see `evaluation.ray_pool`.

    Attributes:
        lock: of the directory; taken by the first stage that writes there, and held as long as the run lives.

    Raises:
        ConfigError: the config names what does not exist, the directory holds a run of another config, or workers are
            asked for here and on a cluster. `task` and `dense` raise it where the directory was made with others.
        InUse: in a stage: another process, or another thread, writes in the directory.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        *,
        task: Task | None = None,
        progress: Progress = SILENT,
        clock: Clock = time.perf_counter,
        fresh_table: bool = False,
        workers: int | None = 1,
        ray: str | None = None,
    ) -> None:
        refused()  # torch must know before a model runs
        check_names(config, task_given=task is not None)
        self.config, self.directory, self.progress, self.clock = config, directory, progress, clock
        self._given_task, self._fresh_table = task, fresh_table
        self._workers, self._ray = cores() if workers is None else workers, ray
        self._work_threads = torch.get_num_threads()
        if ray is not None and workers is not None and workers != 1:
            raise ConfigError("workers and ray exclude each other: a cluster's nodes say how many workers they have.")
        self.lock = FolderLock(directory)
        with self.lock.or_in_use():
            check_directory(directory, config.to_json())
        self._claim = Claim(directory)  # written when the task has proved to work: `inventory`

    @cached_property
    def task(self) -> Task:
        task = self._given_task or TASKS.create(self.config.task)
        parts = {**task_parts(task), "the config": {key: repr(v) for key, v in flat(self.config.to_json()).items()}}
        with self.lock.or_in_use():
            self._claim.check(parts)
        self._parts = parts
        return task

    def settle(self) -> None:
        """Has the directory forget what the task's functions and data change of themselves, such as a count of calls.

        The same program may go on with the directory in this very process.
        """
        if "task" in self.__dict__:
            self._claim.loosen(self._parts, task_parts(self.task))

    @cached_property
    def dense(self) -> nn.Module:
        """The trained dense model, in eval mode."""
        settings = self.config.dense or self.task.dense_training
        with torch_threads(self._work_threads):
            dense = dense_model(self.task, self.config.task, settings, self.config.seed, self.progress)
        self._parts["the trained dense model"] = model_fingerprints(dense)["weights"]
        with self.lock.or_in_use():
            self._claim.check(self._parts)
        return dense

    @cached_property
    def dense_score(self) -> float:
        """On the validation split.

        Raises:
            AutopruneError: the evaluation fails, or gives no score: it would fail for every plan.
        """
        return self.task.evaluate(self.dense)

    @cached_property
    def inventory(self) -> Inventory:
        env = self.config.env
        inputs = self.task.example_inputs(self.config.latency.batch)
        inventory = take_inventory(self.dense, inputs, keep_dense=env.keep_dense, min_weights=env.min_weights)
        _ = self.dense_score  # before anything that takes long
        self.lock.take()
        check_directory(self.directory, self.config.to_json())  # again: now nobody else can make it
        self._claim.check(self._parts)
        self._claim.write(self._parts)
        write_json(self.directory / "config.json", self.config.to_json())
        self.progress.say(f"{len(inventory.layers)} prunable layers:")
        for layer in inventory.layers:
            shape = "x".join(map(str, layer.weight_shape))
            self.progress.say(f"  {layer.name:<32} {layer.kind:<8} {shape:<16} {layer.macs / 1e6:8.2f} M MACs")
        for row in inventory.dense:
            self.progress.say(f"  {row.name:<32} stays dense: {row.reason}")
        return inventory

    @cached_property
    def _components(self) -> list[ActionComponent]:
        return [ACTIONS.create(choice) for choice in self.config.env.actions]

    @cached_property
    def patterns(self) -> tuple[Choice, ...]:
        """Every pattern a plan of this run can hold."""
        sized = [pattern for c in self._components if isinstance(c, GroupSize) for pattern in c.patterns]
        return tuple(dict.fromkeys([*sized, self.config.env.pattern]))

    @cached_property
    def subject(self) -> Subject:
        config = self.config
        chosen = (c.names for c in self._components if isinstance(c, CriterionChoice))
        criteria = {config.env.criterion.name}.union(*chosen)
        needs = frozenset[str]().union(*(CRITERIA.get(name).needs for name in criteria))
        statistics = collect_statistics(self.dense, self.inventory.names, self.task.calibration, self.task.loss, needs)
        budget = config.finetune.budget or ("latency" if config.target.speedup is not None else "weights")
        return Subject(self.task, self.dense, self.inventory, statistics, config.finetune.settings, config.seed, budget)

    @cached_property
    def table(self) -> LatencyTable:
        """The measured latency table, from the directory when it holds one for this machine."""
        path = self.directory / "latency.json"
        settings = profile_settings(self.subject, self.patterns, self.config.latency.batch, self.config.latency.threads)
        if path.exists() and not self._fresh_table:
            return LatencyTable.load(path, settings=settings, machine=machine_identity())
        protocol = self._protocol(self.config.latency.profile_samples)
        record = profile_record(path, settings, protocol)
        if self._fresh_table:
            path.unlink(missing_ok=True)
            record.clear()
            self._fresh_table = False
        with timing():
            table = profile_table(self.subject, self.patterns, settings, protocol, self.clock, self.progress, record)
        table.save(path)
        record.clear()
        self.progress.say(
            f"latency table: dense {table.dense_ms:.3f} ms, of which prunable layers "
            f"{sum(table.dense_us(name) for name in table.layers) / 1e3:.3f} ms ({path})"
        )
        return table

    @cached_property
    def offered(self) -> Inventory:
        """The layers a plan decides: those whose pruning can save time that is worth having."""
        env = self.config.env
        offered = worth_pruning(self.inventory, self.table, env.max_sparsity, env.min_saving)
        for row in offered.dense[len(self.inventory.dense) :]:
            self.progress.say(f"  {row.name:<32} is left whole: {row.reason}")
        return offered

    def _protocol(self, samples: int) -> Protocol:
        return Protocol(samples=samples, threads=self.config.latency.threads)
