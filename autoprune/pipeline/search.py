"""The search of a run: the problem as an environment, its evaluations and workers, the trials, and the best of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property, partial

from autoprune.agents import AGENTS
from autoprune.agents.base import succeeded
from autoprune.agents.halving import best_plans, halve, rungs
from autoprune.agents.harness import SearchResult, TrialLog, search
from autoprune.config import flat
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.errors import NumericalError
from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.evaluation.measurement import ByTable, CachedEvaluate, Evaluate, Evaluated, Failure, Measurement
from autoprune.evaluation.pool import Pool, ProcessPool
from autoprune.evaluation.ray_pool import RayPool
from autoprune.evaluation.recovery import RECOVERIES
from autoprune.evaluation.recovery.train import Train
from autoprune.evaluation.sensitivity import Sensitivity, probe_sensitivity
from autoprune.identity.claim import Claim
from autoprune.latency.machine import machine_identity
from autoprune.pipeline.monitor import SearchMonitor
from autoprune.pipeline.preparation import Preparation
from autoprune.plan import Plan
from autoprune.report.data import MeasuredPoint


class Search(Preparation):
    """The stages from the latency table to the trials."""

    @cached_property
    def problem(self) -> Problem:
        env, timed = self.config.env, {"the machine": {key: str(value) for key, value in machine_identity().items()}}
        _ = self.table  # says better what is wrong on another machine
        claim = Claim(self.directory / "search")  # a table measured anew makes no older trial as good
        claim.check(timed)
        claim.write(timed)
        sensitivity = probe_sensitivity(
            self.subject,
            self.offered.names,
            env.pattern,
            env.criterion,
            path=self.directory / "sensitivity.json",
            progress=self.progress,
        )
        evaluate = self._remembered
        return self._problem(sensitivity, ByTable(evaluate, self.table) if env.timing == "table" else evaluate)

    @cached_property
    def _remembered(self) -> CachedEvaluate:
        """The trials' evaluations."""
        return CachedEvaluate(self._pool, self.directory / "search" / "evaluations.jsonl")

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
        evaluate = PairedEvaluator(replace(self.evaluator, protocol=protocol, timed=True), reference, speedup)
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
        if not (directory / "trials.jsonl").exists():
            shutil.rmtree(self.directory / "policy", ignore_errors=True)  # of a search that is there no more
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
        try:
            succeeded(result.trials)
        except NumericalError as error:
            raise error from self._remembered.error
        if not (self.directory / "policy" / "policy.json").exists():
            agent.save_policy(self.directory / "policy", env)
        if config.search.halving:
            return replace(result, halved=self._halved(result.trials))
        return replace(result, finalists=self._finalists(result.trials))

    def _finalists(self, trials: Sequence[Trial]) -> tuple[Trial, ...]:
        """The best trials and the first, timed again; none where the clock decides nothing, or there is no choice."""
        count, config = self.config.search.finalists, self.config
        plans = best_plans(trials, count)
        if count == 1 or config.target.sparsity is not None or config.env.timing != "measured":
            return ()
        first = trials[0]
        if first.plan not in plans and not first.failed:  # a refined policy's own plan: it must not end below that
            plans.append(first.plan)
        anew = ((plan, self.measured(plan)) for plan in plans)
        reference = next(((plan, each.speedup) for plan, each in anew if isinstance(each, Measurement)), None)
        if len(plans) == 1 or reference is None:
            return ()
        measured = []
        with self.progress.bar("finalists", len(plans)) as bar:
            for each in self.beside(*reference).in_order(plans):
                measured.append(each)
                bar.advance(1, self._describe(each))
        return tuple(as_trial(self.problem, plan, each) for plan, each in zip(plans, measured, strict=True))

    def _halved(self, trials: Sequence[Trial]) -> tuple[Trial, ...]:
        """The best plans of the search, trained for real: see `agents.halving`."""
        halving = self.config.search.halving
        assert halving is not None
        ladder = rungs(halving.plans, halving.steps, halving.factor)
        log = TrialLog(self.directory / "search" / "trials.jsonl")
        done = [trial for trial in log.read() if trial.fidelity > 0]

        pools = ExitStack()

        def evaluate_at(steps: int) -> Evaluate:
            pools.close()  # the rung below is done
            pool = pools.enter_context(self._pooled(replace(self.evaluator, recovery=Train(steps))))
            return CachedEvaluate(pool, self.directory / "search" / f"evaluations-{steps}.jsonl")

        with pools, self.progress.bar("halving", sum(rung.plans for rung in ladder)) as bar:
            bar.advance(len(done))

            def shown(trial: Trial) -> None:
                log.append(trial)
                bar.advance(1, f"{trial.fidelity} steps: {self._describe(trial.evaluated)}")

            return tuple(halve(trials, ladder, evaluate_at, partial(as_trial, self.problem), shown, done))

    def _describe(self, evaluated: Evaluated) -> str:
        if isinstance(evaluated, Failure):
            return f"failed: {evaluated.reason}"
        return f"{self.task.metric.text(evaluated.score)} at {evaluated.speedup:.2f}x"

    def _config_text(self) -> str:
        return "\n".join(f"{key} = {value}" for key, value in sorted(flat(self.config.to_json()).items()))
