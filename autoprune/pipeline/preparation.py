"""The stages before the search: the task, the dense model, its prunable layers, their measured times, the evaluator.

Every stage is a function from what it needs to a frozen result; `Preparation` does each once, when first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.config import Config, check_directory, flat
from autoprune.errors import FileError
from autoprune.evaluation.dense import dense_model, dense_settings
from autoprune.evaluation.devices import Device
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.profile import (
    TABLE,
    profile_record,
    profile_settings,
    profile_table,
    shared_file,
    shared_or_measured,
)
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.worth import worth_pruning
from autoprune.files import write_json
from autoprune.identity.claim import Claim, Parts, task_parts
from autoprune.identity.fingerprint import model_fingerprints
from autoprune.latency.quiet import timing
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Clock, Protocol, torch_threads
from autoprune.masks import collect_statistics
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.pipeline.choices import Choices
from autoprune.processes.locks import FolderLock
from autoprune.progress import Progress
from autoprune.tasks import TASKS, Task
from autoprune.training.recipes import recipe_for


@dataclass(frozen=True)
class Context:
    """What all stages of a run share.

    Attributes:
        config: what to do.
        choices: what it names.
        directory: where everything is written.
        claim: the directory's identity.
        lock: of the directory; taken by the first stage that writes there.
        progress: where long work is shown.
        clock: seconds; of all timing.
        work_threads: torch threads while training and scoring; timing has the config's.
        workers: processes that evaluate trials.
        ray: in their place, the address of a Ray cluster.
        minutes: of the search, at most; None: as an earlier process was given.
    """

    config: Config
    choices: Choices
    directory: Path
    claim: Claim
    lock: FolderLock
    progress: Progress
    clock: Clock
    work_threads: int
    workers: int
    ray: str | None
    minutes: float | None = None

    @property
    def device(self) -> Device:
        """That measures latency."""
        return self.choices.device

    @property
    def measures(self) -> bool:
        """Whether plans are timed; else the latency table says how fast they are."""
        return self.config.env.timing == "measured"

    def protocol(self, samples: int) -> Protocol:
        """How latency is measured, in so many rounds."""
        return Protocol(samples=samples, threads=self.config.latency.threads)

    @property
    def final_protocol(self) -> Protocol:
        """How the final table is measured, and what has to agree with it: each candidate with its own warm caches."""
        return replace(self.protocol(self.config.latency.samples), lead=1)


@dataclass(frozen=True)
class LoadedTask:
    """A task that the directory is not another one's.

    Attributes:
        task: the model and its data.
        parts: fingerprints of the task and of the config.
    """

    task: Task
    parts: Parts


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be pruned.

    Attributes:
        task: the model's.
        dense: the trained dense model, in eval mode.
        dense_score: its score on the validation split.
        inventory: its prunable layers.
    """

    task: Task
    dense: nn.Module
    dense_score: float
    inventory: Inventory


def load_task(context: Context, given: Task | None) -> LoadedTask:
    """Loads the task the config names, or takes the one that is given.

    Raises:
        ConfigError: the directory was made with another model, other data or functions.
    """
    config = context.config
    if given is None:
        context.progress.say(f"loading {config.task}")  # a function of a user's own may take a while
    task = given or TASKS.create(config.task)
    parts = {**task_parts(task), "the config": {key: repr(v) for key, v in flat(config.to_json()).items()}}
    with context.lock.or_in_use():
        context.claim.check(parts)
    return LoadedTask(task, parts)


def prepare(context: Context, loaded: LoadedTask) -> Prepared:
    """Trains the dense model, or loads it, lists its prunable layers, and claims the directory: the task works.

    Raises:
        AutopruneError: the dense model cannot be scored: no plan could.
        ConfigError: the directory was made with another config or dense model.
        InUse: another process, or another thread, writes in the directory.
    """
    config, task = context.config, loaded.task
    if not (context.directory / "config.json").exists():
        context.device.identity()  # a device that is not there is told before anything that takes long
    with torch_threads(context.work_threads):
        dense = dense_model(task, config.task, dense_settings(task, config.dense), config.seed, context.progress)
    parts = {**loaded.parts, "the trained dense model": model_fingerprints(dense)["weights"]}
    with context.lock.or_in_use():
        context.claim.check(parts)
    inputs = task.example_inputs(config.latency.batch)
    inventory = take_inventory(dense, inputs, keep_dense=config.env.keep_dense, min_weights=config.env.min_weights)
    score = task.evaluate(dense)  # before anything that takes long
    context.lock.take()
    check_directory(context.directory, config.to_json())  # again: now nobody else can make it
    context.claim.check(parts)
    context.claim.write(parts)
    write_json(context.directory / "config.json", config.to_json())
    for name, text in task.facts.items():
        context.progress.say(f"{name}: {text}")
    context.progress.say(f"{len(inventory.layers)} prunable layers:")
    for layer in inventory.layers:
        shape = "x".join(map(str, layer.weight_shape))
        context.progress.say(f"  {layer.name:<32} {layer.kind:<8} {shape:<16} {layer.macs / 1e6:8.2f} M MACs")
    for row in inventory.dense:
        context.progress.say(f"  {row.name:<32} stays dense: {row.reason}")
    return Prepared(task, dense, score, inventory)


def calibrate(context: Context, prepared: Prepared) -> Subject:
    """Collects what the criteria need to know of every layer, in one pass over the calibration batches."""
    config, task, dense, inventory = context.config, prepared.task, prepared.dense, prepared.inventory
    statistics = collect_statistics(dense, inventory.names, task.calibration, task.loss, context.choices.statistics)
    budget = config.finetune.budget or (
        "latency" if config.target.timed else "macs" if config.target.macs is not None else "weights"
    )
    settings = recipe_for(dense).changed(config.finetune.settings)
    subject = Subject(task, dense, inventory, statistics, settings, config.seed, budget, config.precision)
    if config.precision != "float32":
        subject.graph(config.latency.batch)  # refused here, before any work, where the model is no program
    return subject


def table_settings(context: Context, subject: Subject) -> dict[str, Any]:
    """What the run's latency table holds for."""
    latency = context.config.latency
    settings = profile_settings(subject, context.choices.patterns, latency.batch, latency.threads)
    return {**settings, "architecture": context.claim.first("architecture", settings["architecture"])}


def profile(context: Context, subject: Subject, *, fresh: bool = False) -> LatencyTable:
    """Reads the latency table from the directory or the user's cache, or measures it.

    Args:
        context: of the run.
        subject: the model and its prunable layers.
        fresh: measure it again even if there is one.

    Raises:
        StaleTable: the directory's table is of another machine, or of other settings.
    """
    path, settings, device = context.directory / "latency.json", table_settings(context, subject), context.device
    if path.exists() and not fresh:
        return LatencyTable.load(path, settings=settings, machine=device.identity())
    protocol = context.protocol(context.config.latency.profile_samples)
    record = profile_record(path, settings, protocol, device)
    if fresh:
        path.unlink(missing_ok=True)
        record.clear()

    def measure() -> LatencyTable:
        patterns = context.choices.patterns
        with timing():
            return profile_table(subject, patterns, settings, protocol, context.clock, context.progress, record, device)

    table = shared_or_measured(settings, protocol, measure, context.progress.say, fresh=fresh, device=device)
    table.save(path)
    record.clear()
    context.progress.say(
        f"latency table: {device.reference_name} {table.dense_ms:.3f} ms; its prunable layers one by one "
        f"{sum(table.dense_us(name) for name in table.layers) / 1e3:.3f} ms ({path})"
    )
    return table


def layers_worth_pruning(context: Context, inventory: Inventory, table: LatencyTable) -> Inventory:
    """The layers a search decides: those whose pruning can save time that is worth having."""
    env = context.config.env
    offered = worth_pruning(inventory, table, env.max_sparsity, env.min_saving)
    for row in offered.dense[len(inventory.dense) :]:
        context.progress.say(f"  {row.name:<32} is left whole: {row.reason}")
    return offered


def build_evaluator(context: Context, subject: Subject, table: LatencyTable) -> Evaluator:
    """The evaluation of a plan, as the search does it."""
    latency = context.config.latency
    return Evaluator(
        subject=replace(subject, table=table),
        table=table,
        recovery=context.choices.recovery,
        protocol=context.protocol(latency.search_samples),
        batch=latency.batch,
        work_threads=context.work_threads,
        clock=context.clock,
        timed=context.measures,
        device=context.device,
    )


class Preparation:
    """The results of these stages, each made when it is first asked for, and once.

    Args:
        context: of the run.
        task: in place of the task the config names.
        fresh_table: measure the latency table again even if there is one.
    """

    def __init__(self, context: Context, task: Task | None = None, *, fresh_table: bool = False) -> None:
        self._context, self._given, self._fresh_table = context, task, fresh_table
        self._loaded: LoadedTask | None = None

    @property
    def loaded(self) -> LoadedTask:
        if self._loaded is None:
            self._loaded = load_task(self._context, self._given)
        return self._loaded

    def mark_volatile_parts(self) -> None:
        """Has the directory forget what the task's functions and data change of themselves, such as a count of calls.

        The same program may go on with the directory in this very process. Does nothing before the task is loaded.
        """
        if self._loaded is not None:
            self._context.claim.loosen(self._loaded.parts, task_parts(self._loaded.task))

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self._context, self.loaded)

    @cached_property
    def subject(self) -> Subject:
        return calibrate(self._context, self.prepared)

    @cached_property
    def table(self) -> LatencyTable:
        return profile(self._context, self.subject, fresh=self._fresh_table)

    @property
    def table_is_known(self) -> bool:
        """Whether the table is read, from the directory or the user's cache, and not measured."""
        if (self._context.directory / "latency.json").exists():
            return True
        protocol = self._context.protocol(self._context.config.latency.profile_samples)
        try:
            settings = table_settings(self._context, self.subject)
            return shared_file(TABLE, settings, protocol, self._context.device).exists()
        except FileError:
            return False  # there is no cache

    @cached_property
    def offered(self) -> Inventory:
        return layers_worth_pruning(self._context, self.prepared.inventory, self.table)

    @cached_property
    def evaluator(self) -> Evaluator:
        return build_evaluator(self._context, self.subject, self.table)
