"""Rewards: a measured terminal reward, and potential-based shaping on the way (Ng, Harada & Russell 1999)."""

from __future__ import annotations

import math

from autoprune.envs.curves import Decided
from autoprune.envs.knapsack import LOSS_PER_SCORE
from autoprune.envs.problem import Problem
from autoprune.envs.trial import Reward, Trial
from autoprune.evaluation.measurement import Evaluated, Failure, Measurement, checked
from autoprune.plan import Plan

SCORE_WEIGHT = 10.0  # 0.01, a point of accuracy, is 0.1 of reward: the scale the agents' defaults are made for
SHORTFALL_WEIGHT = 10.0  # 10% short of the speed-up costs as much as 0.1 of score
TOLERANCE = 0.02  # a speed-up is met within the timer's noise


def terminal_reward(problem: Problem, measured: Evaluated) -> Reward:
    """Scores a measured plan against the target.

    Speed-up target: score gained over dense, less a penalty for what the *measured* speed-up is short of.
    Accuracy target: log2 of the measured speed-up, less a penalty for a drop beyond what is allowed. Limits on
    other costs: score gained over dense; every plan keeps them. A failure is rewarded as if all of the
    dense score were lost, 1 at least, at the speed-up asked for or none: agents learn to keep away from it.
    """
    if isinstance(measured, Failure):
        lost = max(1.0, abs(problem.dense_score))
        measured = Measurement(problem.dense_score - lost, problem.table.dense_ms, problem.required_speedup or 1.0)
    gained = measured.score - problem.dense_score
    if problem.required_speedup is not None:
        short = max(0.0, problem.required_speedup / measured.speedup - 1.0 - TOLERANCE)
        return Reward(SCORE_WEIGHT * gained, -SHORTFALL_WEIGHT * short)
    if problem.limits:
        return Reward(SCORE_WEIGHT * gained, 0.0)
    allowed = problem.target.accuracy_drop or 0.0
    return Reward(10 * SCORE_WEIGHT * min(0.0, gained + allowed), math.log2(measured.speedup))


def as_trial(problem: Problem, plan: Plan, measured: Evaluated) -> Trial:
    """The trial of a plan that was evaluated, rewarded for the problem's target."""
    measured = checked(measured)
    terms = terminal_reward(problem, measured)
    return Trial(plan, measured, terms.total, terms)


def potential(problem: Problem, decided: Decided) -> float:
    """How good the decided part of a plan looks before it is measured; 0 before the first layer.

    Minus what its layers lose one by one (sensitivity curves) plus, for an accuracy target, the time the table says
    they save.
    """
    value = -SCORE_WEIGHT * min(1.0, decided.lost / LOSS_PER_SCORE)
    if not problem.target.limits:
        value += decided.saved_ms / problem.table.dense_ms
    return value
