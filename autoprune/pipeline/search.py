"""The search stages: the problem as an environment, the trials, the best of them, and the uniform rule beside it.

As in `preparation`, each stage is a function to a frozen result; `PlanSearch` does each once.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property, partial

from autoprune.agents.base import succeeded
from autoprune.agents.baseline import reward_at, uniform_at
from autoprune.agents.halving import best_plans, halve, rungs
from autoprune.agents.harness import SearchResult, TrialLog, search
from autoprune.agents.rules import rule_plans
from autoprune.config import flat
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.actions import ActionSpace
from autoprune.envs.limits import FileSize
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.errors import NumericalError
from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.evaluation.measurement import (
    ByTable,
    CachedEvaluate,
    Evaluate,
    Evaluated,
    Failure,
    Measurement,
    evaluated,
)
from autoprune.evaluation.pool import Pool, ProcessPool
from autoprune.evaluation.ray_pool import RayPool
from autoprune.evaluation.recovery.train import Train
from autoprune.evaluation.sensitivity import ANCHORS, Sensitivity, probe_sensitivity
from autoprune.files import read_json, write_json
from autoprune.identity.claim import Claim
from autoprune.latency.machine import machine_identity
from autoprune.latency.table import LatencyTable
from autoprune.metric import Metric
from autoprune.model.inventory import Inventory
from autoprune.patterns import PATTERNS
from autoprune.pipeline.baselines import EAGER, Baselines, DenseEngines, measure_baselines, prepare_engines
from autoprune.pipeline.correction import Gauge, check_reachable, gauge
from autoprune.pipeline.monitor import SearchMonitor
from autoprune.pipeline.preparation import Context, Preparation
from autoprune.pipeline.time_limit import TimeLimit
from autoprune.plan import Plan
from autoprune.report.data import MeasuredPoint
from autoprune.target import Target


@dataclass(frozen=True)
class SearchProblem:
    """What is searched, and who evaluates.

    Attributes:
        problem: the layers, their curves and the target; its evaluation remembers what `workers` found.
        evaluator: of a single plan, in this process.
        workers: evaluate many plans at once; the search ends them.
        evaluations: what they found, remembered.
    """

    problem: Problem
    evaluator: Evaluator
    workers: Pool
    evaluations: CachedEvaluate

    @property
    def metric(self) -> Metric:
        return self.evaluator.subject.task.metric


@dataclass(frozen=True)
class RatedPlan:
    """A plan that was measured anew, rewarded as if its speed-up had been the target."""

    plan: Plan
    measurement: Measurement
    reward: float


@dataclass(frozen=True)
class UniformComparison:
    """The best plan of the search and the best uniform one at its measured speed-up.

    Attributes:
        agent: the search's.
        uniform: None where no uniform plan is that fast.
        evaluations: that it took to find the uniform one.
    """

    agent: RatedPlan
    uniform: Trial | None
    evaluations: int


def pose_problem(context: Context, evaluator: Evaluator, unscored: Problem) -> SearchProblem:
    """Makes the search's problem, and claims the directory of the search for this machine.

    Args:
        context: of the run.
        evaluator: of a plan.
        unscored: the target and the layers a plan decides.

    Raises:
        ConfigError: the trials that are there were made on another machine.
    """
    env, directory = context.config.env, context.directory
    machine = {"the machine": {key: str(value) for key, value in machine_identity().items()}}
    claim = Claim(directory / "search")  # a table measured anew makes no older trial as good
    claim.check(machine)
    claim.write(machine)
    sensitivity = probe_sensitivity(
        evaluator.subject,
        unscored.inventory.names,
        env.pattern,
        env.criterion,
        path=directory / "sensitivity.json",
        progress=context.progress,
    )
    workers = worker_pool(context, evaluator)
    evaluations = CachedEvaluate(workers, directory / "search" / "evaluations.jsonl")
    evaluate = evaluations if context.measures else ByTable(evaluations, evaluator.table)
    return SearchProblem(replace(unscored, sensitivity=sensitivity, evaluate=evaluate), evaluator, workers, evaluations)


def build_problem(
    context: Context,
    dense_score: float,
    offered: Inventory,
    table: LatencyTable,
    sensitivity: Sensitivity,
    evaluate: Evaluate,
    baselines: Baselines | None,
) -> Problem:
    """The config's target and choices for these layers; other arguments are those of `Problem`.

    The baselines are None where the target is over none of them.
    """
    config, env = context.config, context.config.env
    return Problem(
        inventory=offered,
        table=table,
        sensitivity=sensitivity,
        dense_score=dense_score,
        evaluate=evaluate,
        target=config.target,
        pattern=env.pattern,
        criterion=env.criterion,
        training=config.finetune.method,
        max_sparsity=env.max_sparsity,
        baseline_speedup=1.0 if baselines is None else baselines.over_eager(config.target.over),
        file=FileSize() if baselines is None else file_size(context, offered, baselines),
    )


def file_size(context: Context, inventory: Inventory, baselines: Baselines) -> FileSize:
    """What is known of the size of a packed file in which these layers are pruned."""
    weights = sum(layer.weights for layer in inventory.layers)
    return baselines.file_size(weights, context.config.repack.value_bits)


def build_env(context: Context, problem: Problem) -> PruneEnv:
    """The problem as episodes.

    Raises:
        InfeasibleTarget: no plan can reach the target.
    """
    env = context.config.env
    actions = ActionSpace(list(zip(env.actions, context.choices.actions, strict=True)))
    return PruneEnv(problem, actions, env.shaping, env.gamma, env.start, env.curves)


def worker_pool(context: Context, evaluator: Evaluator) -> Pool:
    """Workers that evaluate as `evaluator` does, each with its share of the threads."""
    if context.ray is not None:
        return RayPool(replace(evaluator, work_threads=1), context.ray)
    each = replace(evaluator, work_threads=max(1, context.work_threads // context.workers))
    return ProcessPool(evaluator, context.workers, each)


def measured_evaluate(context: Context, evaluator: Evaluator) -> CachedEvaluate:
    """Evaluates plans with the clock, as long as the final table does, and remembers them."""
    protocol = context.protocol(context.config.latency.samples)
    return CachedEvaluate(
        replace(evaluator, protocol=protocol, timed=True), context.directory / "search" / "measured.jsonl"
    )


def paired_evaluate(context: Context, evaluator: Evaluator, reference: Plan, speedup: float) -> CachedEvaluate:
    """Evaluates plans with the clock, interleaved with a reference plan of that speed-up, and remembers them."""
    protocol = replace(context.protocol(context.config.latency.samples), lead=1)  # each with its own warm caches
    evaluate = PairedEvaluator(replace(evaluator, protocol=protocol, timed=True), reference, speedup)
    digest = hashlib.sha256(f"{reference.key} {speedup:.6f}".encode()).hexdigest()[:8]
    return CachedEvaluate(evaluate, context.directory / "search" / f"beside-{digest}.jsonl")


def run_search(context: Context, posed: SearchProblem, env: PruneEnv, measured: Evaluate) -> SearchResult:
    """Runs the trials that are missing, and saves the policy of an agent that learns one.

    Args:
        context: of the run.
        posed: what is searched.
        env: the same as episodes.
        measured: `measured_evaluate`, for the finalists.
    """
    config, agent, problem = context.config, context.choices.agent, posed.problem
    directory, policy = context.directory / "search", context.directory / "policy"
    if not (directory / "trials.jsonl").exists():
        shutil.rmtree(policy, ignore_errors=True)  # of a search that is there no more
    context.progress.say(
        f"search: {config.search.agent}, {config.search.episodes} episodes, {config.target.text(posed.metric)}"
    )
    dense = MeasuredPoint(problem.table.dense_ms, problem.dense_score)
    text = "\n".join(f"{key} = {value}" for key, value in sorted(flat(config.to_json()).items()))
    limit = TimeLimit(directory / "minutes.json", context.minutes, context.clock)
    with posed.workers:
        rules = try_rules(context, posed, env, limit) if config.search.rules else {}
        first = best_of(rules)
        with context.progress.bar("search", config.search.episodes) as bar:
            monitor = SearchMonitor(context.directory / "tensorboard", text, posed.metric, dense, bar, first)
            with closing(monitor):
                result = search(
                    agent,
                    env if first is None else _from_there(env, first.plan),
                    config.search.episodes,
                    config.seed,
                    directory=directory,
                    on_trial=monitor.trial,
                    on_resumed=monitor.resumed,
                    patience=config.search.patience,
                    known_best=-math.inf if first is None else first.reward,
                    over=limit.over,
                )
    result = replace(result, rules=rules)
    try:
        succeeded(result.all)
    except NumericalError as error:
        raise error from posed.evaluations.error
    if len(result.trials) < config.search.episodes:
        why = f"{limit.minutes:g} minutes are over" if limit.over() else f"nothing better in {config.search.patience}"
        context.progress.say(f"stopped after {len(result.trials)} episodes: {why}")
    if not (policy / "policy.json").exists():
        agent.save_policy(policy, env)
    if config.search.halving:
        return replace(result, halved=_halved(context, posed, result.all))
    return replace(result, finalists=_finalists(context, posed, result, measured))


def try_rules(context: Context, posed: SearchProblem, env: PruneEnv, limit: TimeLimit) -> dict[str, tuple[Trial, ...]]:
    """Evaluates the plans of every rule, as long as there is time; rule -> its trials.

    What was evaluated before is remembered.
    """
    search, problem = context.config.search, posed.problem
    criteria = list(dict.fromkeys([context.config.env.criterion, *search.criteria]))
    movable = [pattern for pattern in context.choices.patterns if PATTERNS.create(pattern).any_sparsity]
    plans = rule_plans(env, movable, criteria)
    over = False
    with context.progress.bar("rules", sum(map(len, plans.values()))) as bar:
        for rule, of_rule in plans.items():
            for evaluated in problem.evaluate.in_order(of_rule):
                bar.advance(1, f"{rule}: {_describe(evaluated, posed.metric)}")
                if over := limit.over():
                    break
            if over:
                break
    known = {rule: [plan for plan in of_rule if posed.evaluations.knows(plan)] for rule, of_rule in plans.items()}
    return {
        rule: tuple(as_trial(problem, plan, problem.evaluate(plan)) for plan in of_rule)
        for rule, of_rule in known.items()
    }


def best_of(rules: Mapping[str, Sequence[Trial]]) -> Trial | None:
    """The rules' best trial; None where all failed, or there are none."""
    done = [trial for trials in rules.values() for trial in trials if not trial.failed]
    return max(done, key=lambda trial: trial.reward, default=None)


def _from_there(env: PruneEnv, plan: Plan) -> PruneEnv:
    """The environment with the pattern and the criterion of the best rule's plan, for layers whose no action sets."""
    layer = next(iter(plan.layers.values()))
    return env.of(replace(env.problem, pattern=layer.pattern, criterion=layer.criterion))


def _finalists(context: Context, posed: SearchProblem, searched: SearchResult, measured: Evaluate) -> tuple[Trial, ...]:
    """The best trials, the agent's first and the best of each rule, timed again.

    None where the clock decides nothing, or there is no choice.
    """
    config = context.config
    plans = best_plans(searched.all, config.search.finalists)
    if config.search.finalists == 1 or not _clock_counts(config.target) or config.env.timing != "measured":
        return ()
    # a refined policy's own plan, and each rule's: the search must not end below them
    ours = [trial for trial in searched.trials[:1] if not trial.failed]
    rules = [best for trials in searched.rules.values() if (best := best_of({"": trials})) is not None]
    plans += [trial.plan for trial in (*ours, *rules) if trial.plan not in plans]
    again = ((plan, measured(plan)) for plan in plans)
    reference = next(((plan, each.speedup) for plan, each in again if isinstance(each, Measurement)), None)
    if len(plans) == 1 or reference is None:
        return ()
    finalists = []
    with context.progress.bar("finalists", len(plans)) as bar:
        paired = paired_evaluate(context, posed.evaluator, *reference)
        for plan, evaluated in zip(plans, paired.in_order(plans), strict=True):
            finalists.append(as_trial(posed.problem, plan, evaluated))
            bar.advance(1, _describe(evaluated, posed.metric))
    return tuple(finalists)


def _clock_counts(target: Target) -> bool:
    return target.timed or not target.limits


def _halved(context: Context, posed: SearchProblem, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The best plans of the search, trained for real: see `agents.halving`."""
    halving, directory = context.config.search.halving, context.directory / "search"
    assert halving is not None
    ladder = rungs(halving.plans, halving.steps, halving.factor)
    log = TrialLog(directory / "trials.jsonl")
    done = [trial for trial in log.read() if trial.fidelity > 0]
    pools = ExitStack()

    def evaluate_at(steps: int) -> Evaluate:
        pools.close()  # the rung below is done
        pool = pools.enter_context(worker_pool(context, replace(posed.evaluator, recovery=Train(steps))))
        return CachedEvaluate(pool, directory / f"evaluations-{steps}.jsonl")

    with pools, context.progress.bar("halving", sum(rung.plans for rung in ladder)) as bar:
        bar.advance(len(done))

        def record(trial: Trial) -> None:
            log.append(trial)
            bar.advance(1, f"{trial.fidelity} steps: {_describe(trial.evaluated, posed.metric)}")

        return tuple(halve(trials, ladder, evaluate_at, partial(as_trial, posed.problem), record, done))


def _describe(evaluated: Evaluated, metric: Metric) -> str:
    if isinstance(evaluated, Failure):
        return f"failed: {evaluated.reason}"
    return f"{metric.text(evaluated.score)} at {evaluated.speedup:.2f}x"


def compare_with_uniform(
    context: Context, searched: SearchResult, env: PruneEnv, measured: CachedEvaluate
) -> UniformComparison:
    """Measures the best plan and the uniform rule anew, in the same way: the best trial was also the luckiest.

    Read from the directory where it holds the comparison of that plan.

    Args:
        context: of the run.
        searched: whose best plan is compared.
        env: the search's.
        measured: `measured_evaluate`.
    """
    path, plan, what = context.directory / "uniform.json", searched.plan, "the comparison with uniform"
    if not path.exists() or read_json(path, what)["agent"]["plan"] != plan.to_json():
        env = env.of(replace(env.problem, evaluate=measured))
        again = measured(plan)
        if isinstance(again, Failure):
            context.progress.say(f"the best plan failed when it was measured again ({again.reason}): as in the search")
        best = again if isinstance(again, Measurement) else searched.best.measurement
        before = measured.count
        uniform = uniform_at(env, best.speedup)
        agent = {"plan": plan.to_json(), **best.to_json(), "reward": reward_at(env, best, best.speedup)}
        found = uniform.to_json() if uniform else None
        write_json(path, {"agent": agent, "uniform": found, "evaluations": measured.count - before})
    data = read_json(path, what)
    agent, uniform = data["agent"], data["uniform"]
    figures = evaluated(agent)
    assert isinstance(figures, Measurement)
    rated = RatedPlan(plan, figures, float(agent["reward"]))
    return UniformComparison(rated, Trial.from_json(uniform) if uniform else None, int(data["evaluations"]))


class Unscored(Evaluate):
    """Of a problem whose plans nobody scores."""

    def __call__(self, plan: Plan) -> Evaluated:
        return Failure("nothing scores the plans of this problem")


class PlanSearch:
    """The results of these stages, each made when it is first asked for, and once.

    Args:
        context: of the run.
        preparation: the stages before.
    """

    def __init__(self, context: Context, preparation: Preparation) -> None:
        self._context, self._preparation = context, preparation

    @property
    def exists(self) -> bool:
        """Whether the directory holds trials; a plan that was given needs none."""
        return (self._context.directory / "search" / "trials.jsonl").exists()

    @cached_property
    def engines(self) -> DenseEngines:
        return prepare_engines(self._context, self._preparation.prepared)

    @cached_property
    def baselines(self) -> Baselines | None:
        """None where the target is over none of them: torch eager is timed with every plan."""
        target = self._context.config.target
        if target.size_bytes is None and target.latency_ms is None and (target.speedup is None or target.over == EAGER):
            return None
        return measure_baselines(self._context, lambda: self.engines)

    @cached_property
    def by_table(self) -> Problem:
        """The target and the layers, as the latency table alone sees them; nobody scores its plans."""
        before = self._preparation
        none = dict.fromkeys(before.offered.names, (0.0,) * len(ANCHORS))
        return build_problem(
            self._context,
            before.prepared.dense_score,
            before.offered,
            before.evaluator.table,
            Sensitivity(ANCHORS, none, none),
            Unscored(),
            self.baselines,
        )

    @cached_property
    def most_pruned(self) -> list[Plan]:
        """The plans of the highest sparsity everywhere, one a pattern that a plan may name."""
        problem = self.by_table
        patterns = [replace(problem, pattern=pattern) for pattern in self._context.choices.patterns]
        return [each.uniform(problem.max_sparsity) for each in patterns]

    @cached_property
    def unscored(self) -> Problem:
        """The target and the layers, for those who plan without a search.

        Raises:
            InfeasibleTarget: the most pruned model is measured to miss the target.
        """
        problem = self.by_table
        if not self._context.measures:
            return problem
        bias = check_reachable(problem, self.most_pruned, lambda plan: self.gauge_of(problem).of_plan(plan))
        return replace(problem, table=problem.table.scaled(bias)) if bias > 1.0 else problem

    @cached_property
    def gauge(self) -> Gauge:
        """Measures what a repacked model reaches of the target."""
        return self.gauge_of(self.unscored)

    def gauge_of(self, problem: Problem) -> Gauge:
        """Measures what a repacked model reaches of a problem's target."""
        best = None if self.baselines is None else self.baselines.best
        return gauge(self._context, self._preparation.evaluator, problem, lambda: self.engines, best)

    @cached_property
    def posed(self) -> SearchProblem:
        before = self._preparation
        return pose_problem(self._context, before.evaluator, self.unscored)

    @cached_property
    def env(self) -> PruneEnv:
        return build_env(self._context, self.posed.problem)

    @cached_property
    def measured(self) -> CachedEvaluate:
        return measured_evaluate(self._context, self._preparation.evaluator)

    @cached_property
    def result(self) -> SearchResult:
        return run_search(self._context, self.posed, self.env, self.measured)

    @cached_property
    def comparison(self) -> UniformComparison:
        return compare_with_uniform(self._context, self.result, self.env, self.measured)

    def paired(self, reference: Plan, speedup: float) -> CachedEvaluate:
        """See `paired_evaluate`."""
        return paired_evaluate(self._context, self._preparation.evaluator, reference, speedup)
