"""The search stages: the rules' plans, the agent's trials, and the best of them.

As in `preparation`, each stage is a function to a frozen result; `PlanSearch` does each once.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, product

from autoprune.agents.base import succeeded
from autoprune.agents.harness import SearchResult, search
from autoprune.agents.rules import rule_plans
from autoprune.config import flat
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.errors import NumericalError
from autoprune.evaluation.measurement import (
    CachedEvaluate,
    Evaluate,
)
from autoprune.evaluation.sensitivity import ANCHORS, Sensitivity
from autoprune.patterns import PATTERNS
from autoprune.pipeline.baselines import EAGER, Baselines, DenseEngines, measure_baselines, prepare_engines
from autoprune.pipeline.correction import check_reachable
from autoprune.pipeline.gauge import Gauge, gauge
from autoprune.pipeline.monitor import SearchMonitor
from autoprune.pipeline.preparation import Context, Preparation
from autoprune.pipeline.problem import SearchProblem, Unscored, build_env, build_problem, pose_problem
from autoprune.pipeline.selection import (
    UniformComparison,
    best_of,
    compare_with_uniform,
    describe,
    finalists_of,
    halved,
    measured_evaluate,
    paired_evaluate,
)
from autoprune.pipeline.time_limit import TimeLimit
from autoprune.plan import Plan
from autoprune.progress import counted
from autoprune.report.data import MeasuredPoint


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
        f"search: {config.search.agent}, {counted(config.search.episodes, 'episodes')}, "
        f"{config.target.text(posed.metric, config.precision)}"
    )
    dense = MeasuredPoint(problem.table.dense_ms, problem.dense_score)
    text = "\n".join(f"{key} = {value}" for key, value in sorted(flat(config.to_json()).items()))
    limit = TimeLimit(directory / "minutes.json", context.minutes, context.clock)
    with posed.workers:
        rules = try_rules(context, posed, env, limit) if config.search.rules else {}
        first = best_of(chain.from_iterable(rules.values()))
        with context.progress.bar("search", config.search.episodes) as bar:
            shown = partial(describe, problem=problem, metric=posed.metric)
            of_rules = {rule: best.reward for rule, trials in rules.items() if (best := best_of(trials))}
            folder = context.directory / "tensorboard"
            monitor = SearchMonitor(folder, text, posed.metric, dense, bar, shown, first, of_rules)
            agent.watch(monitor.learning)
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
        context.progress.say(f"stopped after {counted(len(result.trials), 'episodes')}: {why}")
    if not (policy / "policy.json").exists():
        agent.save_policy(policy, env)
    if config.search.halving:
        return replace(result, halved=halved(context, posed, result.all))
    return replace(result, finalists=finalists_of(context, posed, result, measured))


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
                bar.advance(1, f"{rule}: {describe(evaluated, problem, posed.metric)}")
                if over := limit.over():
                    break
            if over:
                break
    known = {rule: [plan for plan in of_rule if posed.evaluations.knows(plan)] for rule, of_rule in plans.items()}
    return {
        rule: tuple(as_trial(problem, plan, problem.evaluate(plan)) for plan in of_rule)
        for rule, of_rule in known.items()
    }


def _from_there(env: PruneEnv, plan: Plan) -> PruneEnv:
    """The environment with the pattern and the criterion of the best rule's plan, for layers whose no action sets.

    Likewise with the precision that most of its layers have.
    """
    layers = list(plan.layers.values())
    precision = Counter(layer.precision for layer in layers).most_common(1)[0][0]
    pattern, criterion = layers[0].pattern, layers[0].criterion
    return env.of(replace(env.problem, pattern=pattern, criterion=criterion, layer_precision=precision))


BEFORE = "before training"  # a stage of what is gauged


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
        return self.all_baselines

    @cached_property
    def all_baselines(self) -> Baselines:
        """The dense engines' times, and those of the dense model repacked."""
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
        """The plans of the highest sparsity everywhere, one a pattern and precision that a plan may name."""
        problem = self.by_table
        ways = product(self._context.choices.patterns, problem.precisions)
        alike = [replace(problem, pattern=pattern, layer_precision=precision) for pattern, precision in ways]
        return [each.uniform(problem.max_sparsity) for each in alike]

    @cached_property
    def unscored(self) -> Problem:
        """The target and the layers, for those who plan without a search.

        Raises:
            InfeasibleTarget: the most pruned model is measured to miss the target.
        """
        problem = self.by_table
        if not self._context.measures:
            return problem
        bias = check_reachable(problem, self.most_pruned, lambda plan: self.gauge.kept(BEFORE, plan))
        return replace(problem, table=problem.table.scaled(bias)) if bias > 1.0 else problem

    @cached_property
    def gauge(self) -> Gauge:
        """Measures what a repacked model reaches of the target, whatever the latency table says."""
        evaluator = self._preparation.evaluator
        return gauge(self._context, evaluator, self.by_table, lambda: self.engines, self.baselines)

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
