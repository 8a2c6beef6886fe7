"""A run: one config, one directory, and the stages from a task to a fast model.

Every stage writes its result before the next one starts and loads it when it is there already, so a stopped run
goes on where it was, and every verb of the command line is "run the stages up to this one".
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from autoprune.agents.baseline import CLOSE, uniform_at
from autoprune.agents.harness import SearchResult
from autoprune.config import Config, check_directory, parse_config
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.projection import check_movable, meet
from autoprune.errors import ConfigError, InfeasibleTarget
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.measurement import CachedEvaluate
from autoprune.evaluation.pool import cores
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.evaluation.sensitivity import ANCHORS, Sensitivity
from autoprune.files import read_json, write_json
from autoprune.identity.claim import Claim
from autoprune.latency.timer import Clock, speedup
from autoprune.pipeline.application import AppliedPlan, Repacked, is_complete
from autoprune.pipeline.preparation import Context, Preparation, Prepared, create_choices
from autoprune.pipeline.search import PlanSearch, build_problem
from autoprune.plan import LayerPlan, Plan
from autoprune.processes.locks import FolderLock
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.repack import RepackedModel
from autoprune.repack.kernels.compiler import refused
from autoprune.tasks import Task
from autoprune.tasks.user import functions_of


def uniform_plan(context: Context, preparation: Preparation) -> Plan:
    """A plan without a search: every layer alike, at the target's sparsity, or as fast as it asks.

    The speed-up is measured, and corrected where the latency table was wrong. The methods that find the layers' shares
    spend the cost of this plan.

    Raises:
        ConfigError: the target is an accuracy drop, or a speed-up of a pattern that allows one sparsity alone.
        InfeasibleTarget: no uniform plan is that fast; the message has the best reachable figure.
    """
    config, target, pattern = context.config, context.config.target, context.config.env.pattern
    if target.accuracy_drop is not None:
        raise ConfigError("pruning without a search needs --sparsity or --speedup (or a target that is one).")
    if target.speedup is None:
        layer = LayerPlan(target.sparsity or 0.0, pattern, config.env.criterion)
        return Plan(dict.fromkeys(preparation.prepared.inventory.names, layer), config.finetune.method)
    check_movable(pattern)  # before the table, which takes a while
    offered, evaluator = preparation.offered, preparation.evaluator
    none = dict.fromkeys(offered.names, (0.0,) * len(ANCHORS))
    problem = build_problem(
        context,
        preparation.prepared.dense_score,
        offered,
        evaluator.table,
        Sensitivity(ANCHORS, none, none),  # of no use here
        CachedEvaluate(replace(evaluator, recovery=NoRecovery())),
    )
    env = PruneEnv(problem, (Choice("sparsity"),))
    trial = uniform_at(env, target.speedup)
    if trial is None:
        raise InfeasibleTarget(
            f"no uniform plan was measured to be {target.speedup:g}x faster, though the latency table predicts "
            f"{env.reachable_speedup():.2f}x at best. Ask for less, allow a higher sparsity "
            "(env.max_sparsity), or let more layers be pruned."
        )
    return trial.plan


@dataclass(frozen=True)
class Recalibrated:
    """A plan moved by what the clock and the latency table disagree on.

    Attributes:
        plan: whose speed-up in the table is `predicted`, as near as its patterns come.
        measured: speed-up of the repacked model before.
        predicted: the speed-up in the table that should be measured as the target's.
    """

    plan: Plan
    measured: float
    predicted: float


def recalibrate(context: Context, evaluator: Evaluator, repacked: Repacked) -> Recalibrated | None:
    """Moves a plan whose repacked model misses the target's speed-up; None where it is met, or no speed-up is asked."""
    target = context.config.target.speedup
    if target is None:
        return None
    evaluator = replace(evaluator, protocol=context.protocol(context.config.latency.samples))
    measured = speedup(*evaluator.time(repacked.model))
    if measured >= target * (1 - CLOSE):
        return None
    predicted = evaluator.table.predict_speedup(repacked.plan) * target / measured
    plan = meet(repacked.plan, evaluator.table, predicted, context.config.env.max_sparsity)
    context.progress.say(
        f"measured {measured:.2f}x of {target:g}x: once more, with {predicted:.2f}x in the latency table"
    )
    return Recalibrated(plan, measured, predicted)


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

    def _plan(self) -> Plan:
        if self._plan_file.exists():
            plan = Plan.load(self._plan_file)
            plan.check_layers(self.prepared.inventory.names)
            return plan
        best = self.searched.best
        best.plan.save(self._plan_file)
        measured = best.measurement
        self.progress.say(
            f"best plan: {self.task.metric.describe(measured.score)}, {measured.speedup:.2f}x, reward {best.reward:.3f}"
        )
        return best.plan

    @property
    def _plan_file(self) -> Path:
        return self.directory / "plan.json"

    def plan_uniformly(self) -> None:
        """Takes a plan without a search, unless there is one: see `uniform_plan`."""
        if not self._plan_file.exists():
            uniform_plan(self.context, self.preparation).save(self._plan_file)

    def adopt(self, path: Path) -> None:
        """Takes the plan of a file in place of a searched one; refused when the run has another already."""
        plan = Plan.load(path)
        plan.check_layers(self.prepared.inventory.names)
        if self._plan_file.exists() and Plan.load(self._plan_file) != plan:
            raise ConfigError(
                f"{self.directory} has a plan already, and it differs from {path}. Use another --run-dir."
            )
        plan.save(self._plan_file)

    def recalibrate(self) -> None:
        """Applies a plan that is as much faster as the trained, repacked model fell short of the target.

        Once a run, and only after a miss: methods that find the layers' shares spend the plan's milliseconds by the
        latency table, which the clock may not agree with.
        """
        path = self.directory / "aim.json"
        if self.config.target.speedup is None or path.exists():
            return
        moved = recalibrate(self.context, self.preparation.evaluator, self.applied.repacked)
        if moved is None:
            return
        if moved.plan != self.plan:
            moved.plan.save(self._plan_file)
            self._applied = AppliedPlan(self.context, self.preparation, moved.plan)
        write_json(path, {"measured": moved.measured, "aim": moved.predicted})


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
