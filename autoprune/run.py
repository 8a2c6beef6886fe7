"""A run: one config, one directory, and the stages from a task to a fast model.

Every stage writes its result before the next one starts and loads it when it is there already, so a stopped run
goes on where it was, and every verb of the command line is "run the stages up to this one".
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.agents import AGENTS
from autoprune.agents.base import Trial
from autoprune.agents.halving import FIDELITY, best_plans, halve, rungs
from autoprune.agents.harness import SearchResult, TrialLog, search
from autoprune.agents.rival import CLOSE, reward_at, uniform_at
from autoprune.config import Config, check_directory, flat
from autoprune.criteria import CRITERIA
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.actions import ACTIONS, ActionComponent
from autoprune.envs.actions.criterion import CriterionChoice
from autoprune.envs.actions.group_size import GroupSize
from autoprune.envs.projection import check_movable, meet
from autoprune.envs.rewards import as_trial
from autoprune.errors import ConfigError, FileError, InfeasibleTarget
from autoprune.evaluation.dense import check_reseedable, dense_model, other_dense_models
from autoprune.evaluation.evaluator import Beside, Evaluator
from autoprune.evaluation.finetune import finetune_
from autoprune.evaluation.measurement import ByTable, CachedEvaluate, Evaluate
from autoprune.evaluation.pool import Pool, ProcessPool, cores
from autoprune.evaluation.profile import profile_settings, profile_table, worth_pruning
from autoprune.evaluation.ray_pool import RayPool
from autoprune.evaluation.recovery import RECOVERIES, Subject
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.evaluation.recovery.train import Train
from autoprune.evaluation.sensitivity import ANCHORS, Sensitivity, probe_sensitivity
from autoprune.files import read_json, read_tensors, write_json, write_tensors
from autoprune.inventory import Inventory, take_inventory
from autoprune.latency.engines import ENGINES
from autoprune.latency.machine import machine_identity
from autoprune.latency.quiet import timing
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Clock, Protocol, speedup, torch_threads
from autoprune.masks import collect_statistics
from autoprune.monitor import SearchMonitor
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.repack import RepackedModel, load, repack, save
from autoprune.report.data import MeasuredPoint
from autoprune.report.tensorboard import TrialWriter
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


class Run:
    """The stages of one run. Each property or method does its stage, and those before it, once.

    Args:
        config: what to do.
        directory: where everything is written; a directory of another config is refused.
        task: in place of the task the config names.
        fresh_table: measure the latency table again even if there is one.
        workers: processes that evaluate trials, which change no result; None: one a core.
        ray: in their place, the address of a Ray cluster: see `evaluation.ray_pool`.

    Raises:
        ConfigError: the config names what does not exist, the directory holds a run of another config, or workers are
            asked for here and on a cluster.
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
        check_names(config, task_given=task is not None)
        self.config, self.directory, self.progress, self.clock = config, directory, progress, clock
        self._given_task, self._fresh_table = task, fresh_table
        self._workers, self._ray = cores() if workers is None else workers, ray
        self._work_threads = torch.get_num_threads()
        if ray is not None and workers is not None and workers != 1:
            raise ConfigError("workers and ray exclude each other: a cluster's nodes say how many workers they have.")
        check_directory(directory, config.to_json())  # it is claimed when the task has proved to work: `inventory`

    @cached_property
    def task(self) -> Task:
        if self._given_task is not None:
            return self._given_task
        return TASKS.create(self.config.task)

    @cached_property
    def dense(self) -> nn.Module:
        """The trained dense model, in eval mode."""
        settings = self.config.dense or self.task.dense_training
        with torch_threads(self._work_threads):
            return dense_model(self.task, self.config.task, settings, self.config.seed, self.progress)

    @cached_property
    def dense_score(self) -> float:
        """On the validation split."""
        return self.task.evaluate(self.dense)

    @cached_property
    def inventory(self) -> Inventory:
        env = self.config.env
        inputs = self.task.example_inputs(self.config.latency.batch)
        inventory = take_inventory(self.dense, inputs, keep_dense=env.keep_dense, min_weights=env.min_weights)
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
        with timing():
            table = profile_table(self.subject, self.patterns, settings, protocol, self.clock, self.progress)
        table.save(path)
        self._fresh_table = False
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

    @cached_property
    def problem(self) -> Problem:
        env = self.config.env
        sensitivity = probe_sensitivity(
            self.subject,
            self.offered.names,
            env.pattern,
            env.criterion,
            path=self.directory / "sensitivity.json",
            progress=self.progress,
        )
        evaluate: Evaluate = CachedEvaluate(self._pool, self.directory / "search" / "evaluations.jsonl")
        if env.timing == "table":
            evaluate = ByTable(evaluate, self.table)
        return self._problem(sensitivity, evaluate)

    @cached_property
    def _pool(self) -> Pool:
        """The search's workers; `found` ends them."""
        return self._pooled(self.evaluator)

    def _pooled(self, evaluator: Evaluator) -> Pool:
        if self._ray is not None:
            return RayPool(replace(evaluator, work_threads=1), self._ray)
        each = replace(evaluator, work_threads=max(1, self._work_threads // self._workers))
        return ProcessPool(evaluator, self._workers, each)

    def _problem(self, sensitivity: Sensitivity, evaluate: Evaluate) -> Problem:
        env = self.config.env
        return Problem(
            inventory=self.offered,
            table=self.table,
            sensitivity=sensitivity,
            dense_score=self.dense_score,
            evaluate=evaluate,
            target=self.config.target,
            pattern=env.pattern,
            criterion=env.criterion,
            training=self.config.finetune.method,
            max_sparsity=env.max_sparsity,
        )

    @cached_property
    def evaluator(self) -> Evaluator:
        latency = self.config.latency
        return Evaluator(
            subject=replace(self.subject, table=self.table),
            table=self.table,
            recovery=RECOVERIES.create(self.config.env.recovery),
            protocol=self._protocol(latency.search_samples),
            batch=latency.batch,
            work_threads=self._work_threads,
            clock=self.clock,
            timed=self.config.env.timing == "measured",
        )

    @cached_property
    def measured(self) -> CachedEvaluate:
        """Evaluates plans with the clock, as long as the final table does, and remembers them."""
        evaluate = replace(self.evaluator, protocol=self._protocol(self.config.latency.samples), timed=True)
        return CachedEvaluate(evaluate, self.directory / "search" / "measured.jsonl")

    def beside(self, reference: Plan, speedup: float) -> CachedEvaluate:
        """Evaluates plans with the clock, in turns with a reference plan of that speed-up, and remembers them."""
        protocol = replace(self._protocol(self.config.latency.samples), lead=1)  # each with its own warm caches
        evaluate = Beside(replace(self.evaluator, protocol=protocol, timed=True), reference, speedup)
        digest = hashlib.sha256(f"{reference.key} {speedup:.6f}".encode()).hexdigest()[:8]
        return CachedEvaluate(evaluate, self.directory / "search" / f"beside-{digest}.jsonl")

    @cached_property
    def env(self) -> PruneEnv:
        env = self.config.env
        return PruneEnv(self.problem, env.actions, env.shaping, env.gamma, env.start, env.curves)

    @cached_property
    def found(self) -> SearchResult:
        """The search's trials; only those that are missing are run."""
        config, directory = self.config, self.directory / "search"
        agent, env = AGENTS.create(config.search.agent), self.env
        self.progress.say(
            f"search: {config.search.agent}, {config.search.episodes} episodes, {config.target.text(self.task.metric)}"
        )
        with self.progress.bar("search", config.search.episodes) as bar:
            dense = MeasuredPoint(self.table.dense_ms, self.dense_score)
            monitor = SearchMonitor(self.directory / "tensorboard", self._config_text(), self.task.metric, dense, bar)
            with closing(monitor), self._pool:
                result = search(
                    agent,
                    env,
                    config.search.episodes,
                    config.seed,
                    directory=directory,
                    on_trial=monitor.trial,
                    on_resumed=monitor.resumed,
                )
        if not (self.directory / "policy" / "policy.json").exists():
            agent.save_policy(self.directory / "policy", env)
        if config.search.halving:
            return replace(result, halved=self._halved(result.trials))
        return replace(result, finalists=self._finalists(result.trials))

    def _finalists(self, trials: Sequence[Trial]) -> tuple[Trial, ...]:
        """The best trials and the first, timed again; none where the clock decides nothing, or there is no choice."""
        count, config = self.config.search.finalists, self.config
        if count == 1 or config.target.sparsity is not None or config.env.timing != "measured":
            return ()
        # A refined policy's own plan is the first: it must not end below that.
        plans = best_plans(trials, count)
        plans = list({plan.key: plan for plan in [*plans, Plan.from_json(trials[0]["plan"])]}.values())
        if len(plans) == 1:
            return ()
        measured = []
        with self.progress.bar("finalists", len(plans)) as bar:
            for each in self.beside(plans[0], self.measured(plans[0]).speedup).in_order(plans):
                measured.append(each)
                bar.advance(1, f"{self.task.metric.text(each.score)} at {each.speedup:.2f}x")
        return tuple(as_trial(self.problem, plan, each) for plan, each in zip(plans, measured, strict=True))

    def _halved(self, trials: Sequence[Trial]) -> tuple[Trial, ...]:
        """The best plans of the search, trained for real: see `agents.halving`."""
        halving = self.config.search.halving
        assert halving is not None
        ladder = rungs(halving.plans, halving.steps, halving.factor)
        log = TrialLog(self.directory / "search" / "trials.jsonl")
        done = [trial for trial in log.read() if FIDELITY in trial]

        pools = ExitStack()

        def evaluate_at(steps: int) -> Evaluate:
            pools.close()  # the rung below is done
            pool = pools.enter_context(self._pooled(replace(self.evaluator, recovery=Train(steps))))
            return CachedEvaluate(pool, self.directory / "search" / f"evaluations-{steps}.jsonl")

        with pools, self.progress.bar("halving", sum(rung.plans for rung in ladder)) as bar:
            bar.advance(len(done))

            def shown(trial: Trial) -> None:
                log.append(trial)
                bar.advance(
                    1, f"{trial[FIDELITY]} steps: {self.task.metric.text(trial['score'])} at {trial['speedup']:.2f}x"
                )

            return tuple(halve(trials, ladder, evaluate_at, partial(as_trial, self.problem), shown, done))

    @cached_property
    def plan(self) -> Plan:
        """The plan to apply: the directory's, or the best one found."""
        path = self.directory / "plan.json"
        if path.exists():
            plan = Plan.load(path)
            plan.check_layers(self.inventory.names)
            return plan
        plan = self.found.plan
        plan.save(path)
        best = self.found.best
        self.progress.say(
            f"best plan: {self.task.metric.said(best['score'])}, {best['speedup']:.2f}x, reward {best['reward']:.3f}"
        )
        return plan

    def decide(self) -> None:
        """Takes a plan without a search: every layer alike, at the target's sparsity, or as fast as it asks.

        The speed-up is measured, and aimed at again where the latency table was wrong. The methods that find the
        layers' shares spend the cost of this plan.

        Raises:
            ConfigError: the target is an accuracy drop, or a speed-up of a pattern that allows one sparsity alone.
            InfeasibleTarget: no uniform plan is that fast; the message has the best reachable figure.
        """
        target, env = self.config.target, self.config.env
        if (self.directory / "plan.json").exists():
            return
        if target.accuracy_drop is not None:
            raise ConfigError("pruning without a search needs --sparsity or --speedup (or a target that is one).")
        layer = LayerPlan(target.sparsity or 0.0, env.pattern, env.criterion)
        plan = Plan(dict.fromkeys(self.inventory.names, layer), self.config.finetune.method)
        if target.speedup is not None:
            check_movable(env.pattern)  # before the table, which takes a while
            none = dict.fromkeys(self.offered.names, (0.0,) * len(ANCHORS))
            unknown = Sensitivity(ANCHORS, none, none)
            untrained = replace(self.evaluator, recovery=NoRecovery())
            env_ = PruneEnv(self._problem(unknown, CachedEvaluate(untrained)), (Choice("sparsity"),))
            found = uniform_at(env_, target.speedup)
            if found is None:
                raise InfeasibleTarget(
                    f"no uniform plan was measured to be {target.speedup:g}x faster, though the latency table predicts "
                    f"{env_.reachable_speedup():.2f}x at best. Ask for less, allow a higher sparsity "
                    "(env.max_sparsity), or let more layers be pruned."
                )
            plan = Plan.from_json(found["plan"])
        plan.save(self.directory / "plan.json")

    def aim_again(self) -> None:
        """Trains once more, to a plan that is as much faster as the trained, repacked model fell short of the target.

        Once a run, and only after a miss: methods that find the layers' shares spend the plan's milliseconds by the
        latency table, which the clock may not agree with.
        """
        wanted, path = self.config.target.speedup, self.directory / "aim.json"
        if wanted is None or path.exists():
            return
        evaluator = replace(self.evaluator, protocol=self._protocol(self.config.latency.samples))
        measured = speedup(*evaluator.time(self.repacked))
        if measured >= wanted * (1 - CLOSE):
            return
        aim = self.table.predict_speedup(self.plan) * wanted / measured
        plan = meet(self.plan, self.table, aim, self.config.env.max_sparsity)
        self.progress.say(f"measured {measured:.2f}x of {wanted:g}x: once more, with {aim:.2f}x in the latency table")
        if plan != self.plan:
            for name in ("repacked", "masked"):  # before the plan: what is there is always of the plan that is there
                (self.directory / f"{name}.safetensors").unlink(missing_ok=True)
                self.__dict__.pop(name, None)
            plan.save(self.directory / "plan.json")
            self.plan = plan
        write_json(path, {"measured": measured, "aim": aim})

    def adopt(self, path: Path) -> None:
        """Takes the plan of a file in place of a searched one; refused when the run has another already."""
        plan = Plan.load(path)
        plan.check_layers(self.inventory.names)
        own = self.directory / "plan.json"
        if own.exists() and Plan.load(own) != plan:
            raise ConfigError(
                f"{self.directory} has a plan already, and it differs from {path}. Use another --run-dir."
            )
        plan.save(own)

    @cached_property
    def uniform(self) -> dict[str, Any]:
        """The best plan as ``agent`` and the ``uniform`` rule at its measured speed-up (None: not that fast).

        Both are measured anew, in the same way: the best of many trials was also the luckiest with the clock.
        """
        path = self.directory / "uniform.json"
        if not path.exists():
            problem = replace(self.problem, evaluate=self.measured)
            env = self.env.of(problem)
            plan = self.found.plan
            agent = {"plan": plan.to_json(), **problem.evaluate(plan).to_json()}
            speedup = agent["speedup"]
            rival = uniform_at(env, speedup)
            write_json(path, {"agent": {**agent, "reward": reward_at(env, agent, speedup)}, "uniform": rival})
        data: dict[str, Any] = read_json(path, "the comparison with uniform")
        return data

    @cached_property
    def pruned(self) -> nn.Module:
        """The dense model under the plan's masks, recovered as in the search, not fine-tuned."""
        path = self.directory / "pruned.safetensors"
        if (model := self._load(path, trained=self.evaluator.recovery.trains)) is None:
            model = self.evaluator.masked_model(self.plan)
            write_tensors(path, model.state_dict())
        return model

    @cached_property
    def masked(self) -> nn.Module:
        """The masked model, fine-tuned by the plan's method."""
        path = self.directory / "masked.safetensors"
        if (model := self._load(path, trained=True)) is None:
            model = self._finetuned()
            write_tensors(path, model.state_dict())
            shutil.rmtree(self.directory / "finetune", ignore_errors=True)
        return model

    @cached_property
    def repacked(self) -> RepackedModel:
        """The fast model, its backends chosen by measurement here."""
        path = self.directory / "repacked.safetensors"
        if path.exists():
            return load(path, self._untrained())
        latency = self.config.latency
        with torch_threads(latency.threads):
            model = repack(
                self.masked,
                self.task.example_inputs(latency.batch),
                protocol=self._protocol(latency.search_samples),
                clock=self.clock,
            )
        value_bits = self.config.repack.value_bits
        save(model, path, value_bits=value_bits)
        return model if value_bits == 32 else load(path, self._untrained())

    def _finetuned(self) -> nn.Module:
        model = copy.deepcopy(self.dense)
        with torch_threads(self._work_threads), TrialWriter(self.directory / "tensorboard" / "finetune") as writer:
            finetune_(
                model,
                self.plan,
                self.evaluator.subject if self.subject.budget == "latency" else self.subject,  # the table takes a while
                self.config.finetune.settings,
                teachers=self._other_teachers(),
                checkpoint=self.directory / "finetune",
                progress=self.progress,
                title="fine-tuning",
                on_signals=lambda step, signals: writer.training(step, signals.scalars, signals.histograms),
            )
        return model.eval()

    def _other_teachers(self) -> list[nn.Module]:
        """The dense models of other seeds that fine-tuning distils from, beside the run's own."""
        config = self.config
        settings = config.finetune.settings.changed(self.plan.settings)
        if config.finetune.teachers == 1 or settings.distillation_weight == 0:
            return []
        return other_dense_models(config.task, config.dense, config.seed, config.finetune.teachers - 1, self.progress)

    def _untrained(self) -> nn.Module:
        """The architecture that fine-tuning gives: the task's, or wider where the plan's method widens it."""
        model = copy.deepcopy(self.task.model)
        inputs = self.task.example_inputs(self.config.latency.batch)
        TRAINING.create(self.plan.training).widen_(model, inputs, self.plan)
        return model

    def _load(self, path: Path, *, trained: bool) -> nn.Module | None:
        """The model of a file, None when there is none; `trained`: the plan's method trained it."""
        if not path.exists():
            return None
        tensors, _ = read_tensors(path, "the saved model")
        model = self._untrained() if trained else copy.deepcopy(self.task.model)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise FileError(
                f"the saved model {path} does not fit the task ({error}). Delete it to redo its stage."
            ) from None
        return model.eval()

    def _protocol(self, samples: int) -> Protocol:
        return Protocol(samples=samples, threads=self.config.latency.threads)

    def _config_text(self) -> str:
        return "\n".join(f"{key} = {value}" for key, value in sorted(flat(self.config.to_json()).items()))
