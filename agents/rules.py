"""What needs no search: the uniform rule, the knapsack and the bundled policy. Every search begins with their plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoprune.agents.base import always, finished_plan
from autoprune.agents.policy import SHIPPED, Policy
from autoprune.envs.prune import PruneEnv
from autoprune.plan import Plan
from autoprune.registry import Choice

UNIFORM, KNAPSACK, POLICY = "uniform", "knapsack", "bundled policy"


def rule_plans(env: PruneEnv, patterns: Sequence[Choice], criteria: Sequence[Choice]) -> Mapping[str, list[Plan]]:
    """The plans of every rule on the environment's target; a plan that an earlier rule made is left out.

    Args:
        env: the problem, as episodes.
        patterns: that the latency table has.
        criteria: whose statistics are there.

    Returns:
        Rule -> its plans: uniform and knapsack one a pattern and criterion, the uniform rule one a precision that plans
        can choose too, and where the target is an accuracy drop one a sparsity; the policy one.
    """
    known: set[str] = set()
    plans: dict[str, list[Plan]] = {}
    for rule, plan in _all(env, patterns, criteria):
        if plan.key not in known:
            known.add(plan.key)
            plans.setdefault(rule, []).append(plan)
    return plans


def _all(env: PruneEnv, patterns: Sequence[Choice], criteria: Sequence[Choice]) -> Iterator[tuple[str, Plan]]:
    problems = [
        replace(env.problem, pattern=pattern, criterion=criterion)
        for pattern, criterion in itertools.product(patterns, criteria)
    ]
    for problem in problems:
        alike = [
            PruneEnv(replace(problem, layer_precision=precision), (Choice("sparsity"),))
            for precision in problem.precisions
        ]
        anchors = (0.0,) if problem.target.limits else alike[0].actions.components[0].anchors()
        for of_precision, anchor in itertools.product(alike, anchors):
            yield UNIFORM, finished_plan(of_precision, always(np.array([anchor], np.float32)))
    for problem in problems:
        yield KNAPSACK, env.of(problem).solved()
    policy = Policy.load(SHIPPED)
    acting = PruneEnv(env.problem, policy.actions, start=policy.start, curves=policy.curves)
    yield POLICY, finished_plan(acting, policy.act)
