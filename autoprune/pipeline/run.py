"""A run: one config, one directory, and the stages from a task to a fast model.

Every stage writes its result before the next one starts and loads it when it is there already, so a stopped run
goes on where it was, and every verb of the command line is "run the stages up to this one".
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from autoprune.agents.harness import SearchResult
from autoprune.config import Config, check_directory, parse_config
from autoprune.envs import Problem
from autoprune.envs.limits import limits_of
from autoprune.envs.projection import check_limits, check_movable, project
from autoprune.envs.prune import START_SPARSITY
from autoprune.errors import ConfigError, InfeasibleTarget
from autoprune.evaluation.pool import cores
from autoprune.files import read_json, write_json
from autoprune.identity.claim import Claim
from autoprune.latency.timer import Clock
from autoprune.model.inventory import Inventory
from autoprune.pipeline.application import AppliedPlan, is_complete
from autoprune.pipeline.choices import create_choices
from autoprune.pipeline.contest import best_by_source, clear, contest, take_winner
from autoprune.pipeline.correction import Corrected, check_reached, correct, free_without_pruning, further
from autoprune.pipeline.preparation import Context, Preparation, Prepared
from autoprune.pipeline.problem import file_size
from autoprune.pipeline.search import BEFORE, PlanSearch
from autoprune.plan import LayerPlan, Plan
from autoprune.processes.locks import FolderLock
from autoprune.progress import SILENT, Progress
from autoprune.repack import RepackedModel
from autoprune.repack.kernels.compiler import refused
from autoprune.tasks import Task
from autoprune.tasks.user import functions_of

CORRECTED = "corrected.json"  # in a run's directory: how near to the target plans were moved
ATTEMPTS = 3  # trainings of one run, until the model meets its target
SETTLED = 0.99  # of the target: what is missing is the clock's noise, and no reason to train again


def uniform_plan(context: Context, preparation: Preparation, search: PlanSearch) -> Plan:
    """A plan without a search: every layer alike, at the target's sparsity, or as near its limits as the table says.

    The methods that find the layers' shares spend the cost of this plan.

    Raises:
        ConfigError: the target is an accuracy drop alone, or a limit of a pattern that allows one sparsity alone.
        InfeasibleTarget: no uniform plan keeps the limits; the message has the best reachable figure.
    """
    config, target, pattern = context.config, context.config.target, context.config.env.pattern
    if not target.limits:
        raise ConfigError("pruning without a search needs --sparsity or --speedup (or a target that is one).")
    if target.limits == ("sparsity",):
        layer = LayerPlan(target.sparsity or 0.0, pattern, config.env.criterion)
        return Plan(dict.fromkeys(preparation.prepared.inventory.names, layer), config.finetune.method)
    problem = search.unscored
    check_limits(problem)
    return project(problem.uniform(START_SPARSITY), problem)


def check_uniform(config: Config) -> None:
    """Raises ConfigError where there is no plan without a search: nothing chooses it, or there is nothing to move."""
    if config.precision == "planned":
        raise ConfigError(
            "precision 'planned' is for a search, which chooses each layer's, or a plan that is given. Without either "
            "take 'int8', 'mixed' or 'float32'."
        )
    if config.target.limits not in ((), ("sparsity",)):
        check_movable(config.env.pattern)


def corrected(context: Context, search: PlanSearch, plan: Plan) -> Corrected | None:
    """A plan put on the target by measurement; None where that is not what tells if it is met, or nothing is timed.

    Raises:
        InfeasibleTarget: it cannot be.
    """
    if not context.config.target.measured or not context.measures:
        return None
    moved = correct(plan, partial(search.gauge.kept, BEFORE), search.unscored)
    if moved.plan != plan:
        context.progress.say(
            f"moved onto the target in {moved.measurements} measurements: {moved.reached.least:.3f} of it"
        )
    check_reached(moved, search.unscored)
    keep_figures(context, moved)
    return moved


def keep_figures(context: Context, moved: Corrected) -> None:
    """Writes down how near the target a plan was moved, beside the figures of others."""
    path = context.directory / CORRECTED
    known = read_json(path, "how near the target plans are") if path.exists() else {}
    figures = {**asdict(moved.reached), "measurements": moved.measurements, "remark": moved.remark}
    write_json(path, {**known, moved.plan.key: figures})


def on_target(context: Context, search: PlanSearch, plan: Plan) -> Plan:
    """A plan as `corrected` moves it."""
    moved = corrected(context, search, plan)
    return plan if moved is None else moved.plan


def chosen_plan(context: Context, preparation: Preparation, search: PlanSearch) -> Plan:
    """The plan of a search, put on the target; of several that are fine-tuned, the one that is best after that."""
    found, count = search.result, context.config.search.contenders
    if count == 1:
        return on_target(context, search, found.plan)
    best = best_by_source(found, str(context.config.search.agent.name))
    plans = {source: trial.plan for source, trial in itertools.islice(best.items(), count)}
    contenders = contest(context, preparation, plans, partial(corrected, context, search))
    return take_winner(context, contenders)


@contextmanager
def withdrawn_if_refused(directory: Path, search: PlanSearch) -> Iterator[None]:
    """Leaves a directory that holds no trial to a run of another target where this one is out of reach."""
    try:
        yield
    except InfeasibleTarget:
        if not search.exists:
            for name in ("config.json", "identity.json"):
                (directory / name).unlink(missing_ok=True)
        raise


def whole_plan(context: Context, inventory: Inventory) -> Plan:
    """The plan that keeps all weights."""
    layer = LayerPlan(0.0, context.config.env.pattern, context.config.env.criterion)
    return Plan(dict.fromkeys(inventory.names, layer))


class Run:
    """All stages, from the task to the repacked model. Each does its work, and that of those before it, once.

    Args:
        config: what to do.
        directory: where everything is written; a directory of another config, model, data or function is refused.
        task: in place of the task the config names.
        progress: where long work is shown.
        clock: seconds; of all timing.
        fresh_table: measure the latency table again even if there is one.
        workers: processes that evaluate trials, which change no result; None: one a core.
        ray: in their place, the address of a Ray cluster: see `evaluation.ray_pool`.
        minutes: of the search, at most, however many processes it is done in; the best plan so far is taken then. None:
            as many as the directory's search was given before. A plan that is there ends the search for good.

    Attributes:
        context: what all stages share.
        preparation: the stages before the search.
        search: the search's.
        lock: of the directory; taken by the first stage that writes there, and held as long as the run lives.

    Raises:
        ConfigError: the config names what does not exist, the directory holds a run of another config, or workers are
            asked for here and on a cluster. Loading the task and the dense model raises it where the directory was
            made with others.
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
        minutes: float | None = None,
    ) -> None:
        refused()  # torch must know before a model runs
        choices = create_choices(config, task_given=task is not None)
        if ray is not None and workers is not None and workers != 1:
            raise ConfigError("workers and ray exclude each other: a cluster's nodes say how many workers they have.")
        self.config, self.directory, self.progress = config, directory, progress
        self.lock = FolderLock(directory)
        with self.lock.or_in_use():
            check_directory(directory, config.to_json())
        self.context = Context(
            config=config,
            choices=choices,
            directory=directory,
            claim=Claim(directory),  # written when the task has proved to work
            lock=self.lock,
            progress=progress,
            clock=clock,
            work_threads=torch.get_num_threads(),
            workers=cores() if workers is None else workers,
            ray=ray,
            minutes=None if self._plan_file.exists() else minutes,
        )
        self.preparation = Preparation(self.context, task, fresh_table=fresh_table)
        self.search = PlanSearch(self.context, self.preparation)
        self._applied: AppliedPlan | None = None

    @property
    def task(self) -> Task:
        return self.preparation.loaded.task

    @property
    def prepared(self) -> Prepared:
        return self.preparation.prepared

    @property
    def dense(self) -> nn.Module:
        """The trained dense model, in eval mode."""
        return self.prepared.dense

    @property
    def problem(self) -> Problem:
        return self.search.posed.problem

    @property
    def searched(self) -> SearchResult:
        """The search's trials; only those that are missing are run."""
        with withdrawn_if_refused(self.directory, self.search):
            return self.search.result

    @property
    def applied(self) -> AppliedPlan:
        """The directory's plan, or the best one found, and its models."""
        if self._applied is None:
            self._applied = AppliedPlan(self.context, self.preparation, self._plan())
        return self._applied

    @property
    def plan(self) -> Plan:
        return self.applied.plan

    @property
    def pruned(self) -> nn.Module:
        return self.applied.pruned.model

    @property
    def masked(self) -> nn.Module:
        return self.applied.fine_tuned.model

    @property
    def repacked(self) -> RepackedModel:
        return self.applied.repacked.model

    @property
    def complete(self) -> bool:
        """Whether the report is there, and of the plan that is there."""
        return is_complete(self.context, lambda: self.plan)

    @cached_property
    def unpruned(self) -> str | None:
        """What repacking alone gives, where the target is met by that and nothing has to be pruned; else None."""
        if not self.config.target.measured or not self.context.measures:
            return None
        baselines = self.search.all_baselines
        limits = limits_of(
            self.config.target, self.prepared.inventory, file_size(self.context, self.prepared.inventory, baselines)
        )
        return free_without_pruning(
            self.config.target, limits, whole_plan(self.context, self.prepared.inventory), baselines
        )

    def _plan(self) -> Plan:
        if self._plan_file.exists():
            plan = Plan.load(self._plan_file)
            plan.check_run(self.prepared.inventory.names, self.config.precision)
            return plan
        if self.unpruned is not None:
            plan = whole_plan(self.context, self.prepared.inventory)
            self.progress.say(f"nothing is pruned: {self.unpruned} by repacking alone. Ask for more than that")
        else:
            best = self.searched.best
            self.progress.say(
                f"best plan: {self.task.metric.describe(best.measurement.score)}, "
                f"{self.problem.speedup_text(best.measurement.speedup)}, reward {best.reward:.3f}"
            )
            plan = chosen_plan(self.context, self.preparation, self.search)
        plan.save(self._plan_file)
        clear(self.directory)
        return plan

    @property
    def _plan_file(self) -> Path:
        return self.directory / "plan.json"

    def plan_uniformly(self) -> None:
        """Takes a plan without a search, unless there is one: see `uniform_plan`."""
        if self._plan_file.exists():
            return
        check_uniform(self.config)  # before the engines and the table, which take a while
        if self.unpruned is not None:
            self._plan()
        else:
            with withdrawn_if_refused(self.directory, self.search):
                plan = uniform_plan(self.context, self.preparation, self.search)
            on_target(self.context, self.search, plan).save(self._plan_file)

    def adopt(self, path: Path) -> None:
        """Takes the plan of a file in place of a searched one; refused when the run has another already."""
        plan = Plan.load(path)
        plan.check_run(self.prepared.inventory.names, self.config.precision)
        if self._plan_file.exists() and Plan.load(self._plan_file) != plan:
            raise ConfigError(
                f"{self.directory} has a plan already, and it differs from {path}. Use another --run-dir."
            )
        plan.save(self._plan_file)

    def settle(self) -> None:
        """Moves the plan and trains again where the fine-tuned, repacked model misses a limit of the target.

        Once a run, `ATTEMPTS` times at most. Methods that find the layers' shares spend what a plan costs by the
        latency table, which the clock may not agree with.
        """
        path = self.directory / "reached.json"
        if not self.config.target.measured or not self.context.measures or path.exists():
            return
        if all(layer.whole for layer in self.plan.layers.values()):
            return  # nothing is pruned, as repacking alone meets the target
        problem = self.search.unscored
        for attempt in range(1, ATTEMPTS + 1):
            reached = self.search.gauge(self.plan, self.repacked)
            if reached.least >= SETTLED or attempt == ATTEMPTS:
                break
            moved = further(self.plan, reached, partial(self.search.gauge.kept, "after training"), problem)
            if moved.plan == self.plan:
                break
            self.progress.say(f"{reached.least:.3f} of the target is reached: pruned further, and trained again")
            keep_figures(self.context, moved)
            moved.plan.save(self._plan_file)
            self._applied = AppliedPlan(self.context, self.preparation, moved.plan)
        write_json(path, {**asdict(reached), "attempts": attempt})


def run_in(directory: Path, *, run_code: bool, progress: Progress = SILENT) -> Run:
    """The run that is kept in a directory, of the config that is kept there.

    Args:
        directory: of a run.
        run_code: whether functions of a user's own that the config names may be imported and called.
        progress: where long work is shown.

    Raises:
        FileError: there is no such run.
        ConfigError: its functions may not be called, or its model is in a program alone.
    """
    path = directory / "config.json"
    config = parse_config(read_json(path, "the run's config", by_hand=True), str(path))
    if config.task.name == "given":
        raise ConfigError(
            f"{directory} was made by autoprune.compress, whose model only your program has: call "
            "autoprune.export_onnx(model, example_inputs, path) there, or load its repacked.safetensors."
        )
    if not run_code and (functions := functions_of(config.task)):
        raise ConfigError(
            f"{path} names functions that this would import and call: {' and '.join(functions)}. Give --run-code if "
            "you trust that directory and what these names stand for here."
        )
    return Run(config, directory, progress=progress, workers=None)
