"""Which plan of a search is chosen: finalists timed again, or successive halving; and the uniform rule beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from autoprune.agents.baseline import reward_at, uniform_at
from autoprune.agents.halving import best_plans, halve, rungs
from autoprune.agents.harness import SearchResult, TrialLog
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.evaluation.evaluator import Evaluator, PairedEvaluator
from autoprune.evaluation.measurement import (
    CachedEvaluate,
    Evaluate,
    Evaluated,
    Failure,
    Measurement,
    evaluated,
)
from autoprune.evaluation.recovery.train import Train
from autoprune.files import read_json, write_json
from autoprune.metric import Metric
from autoprune.pipeline.preparation import Context
from autoprune.pipeline.problem import SearchProblem, worker_pool
from autoprune.plan import Plan
from autoprune.target import Target


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


def measured_evaluate(context: Context, evaluator: Evaluator) -> CachedEvaluate:
    """Evaluates plans with the clock, as the final table does, and remembers them."""
    evaluate = replace(evaluator, protocol=context.final_protocol, timed=True)
    return CachedEvaluate(evaluate, context.directory / "search" / "measured.jsonl")


def paired_evaluate(context: Context, evaluator: Evaluator, reference: Plan, speedup: float) -> CachedEvaluate:
    """Evaluates plans with the clock, interleaved with a reference plan of that speed-up, and remembers them."""
    evaluate = PairedEvaluator(replace(evaluator, protocol=context.final_protocol, timed=True), reference, speedup)
    digest = hashlib.sha256(f"{reference.key} {speedup:.6f}".encode()).hexdigest()[:8]
    return CachedEvaluate(evaluate, context.directory / "search" / f"beside-{digest}.jsonl")


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The best trial; None where all failed, or there are none."""
    return max((trial for trial in trials if not trial.failed), key=lambda trial: trial.rank, default=None)


def finalists_of(
    context: Context, posed: SearchProblem, searched: SearchResult, measured: Evaluate
) -> tuple[Trial, ...]:
    """The best trials, the agent's first and the best of each rule, timed again.

    None where the clock decides nothing, or there is no choice.
    """
    config = context.config
    plans = best_plans(searched.all, config.search.finalists)
    if config.search.finalists == 1 or not _clock_counts(config.target) or not context.measures:
        return ()
    # a refined policy's own plan, and each rule's: the search must not end below them
    ours = [trial for trial in searched.trials[:1] if not trial.failed]
    rules = [best for trials in searched.rules.values() if (best := best_of(trials)) is not None]
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
            bar.advance(1, describe(evaluated, posed.problem, posed.metric))
    return tuple(finalists)


def _clock_counts(target: Target) -> bool:
    return target.timed or not target.limits


def halved(context: Context, posed: SearchProblem, trials: Sequence[Trial]) -> tuple[Trial, ...]:
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
            bar.advance(1, f"{trial.fidelity} steps: {describe(trial.evaluated, posed.problem, posed.metric)}")

        return tuple(halve(trials, ladder, evaluate_at, partial(as_trial, posed.problem), record, done))


def describe(evaluated: Evaluated, problem: Problem, metric: Metric) -> str:
    """A trial in a few words; its speed-up is over what the target's is over."""
    if isinstance(evaluated, Failure):
        return f"failed: {evaluated.reason}"
    return f"{metric.text(evaluated.score)} at {problem.speedup_text(evaluated.speedup)}"


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
