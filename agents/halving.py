"""Successive halving (Jamieson and Talwalkar 2016): what looks best cheaply is trained, fewer and longer each time.

A reward is compared with rewards of the same fidelity alone: what a plan scored cheaply decides who is trained, never
who is best in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoprune.agents.base import succeeded
from autoprune.envs.trial import Trial
from autoprune.errors import ConfigError
from autoprune.evaluation.measurement import Evaluate, Evaluated
from autoprune.plan import Plan


@dataclass(frozen=True)
class Rung:
    """So many plans, trained for so many steps each."""

    plans: int
    steps: int


def rungs(plans: int, steps: int, factor: int) -> tuple[Rung, ...]:
    """Down to one plan: each rung has `factor` times fewer plans and as many times more steps.

    Raises:
        ConfigError: fewer than 2 plans, no step, or a factor below 2.
    """
    if plans < 2 or steps < 1 or factor < 2:
        raise ConfigError(
            f"successive halving needs 2 plans, a step and a factor of 2 at least, not {plans}, {steps} and {factor}."
        )
    made = [Rung(plans, steps)]
    while made[-1].plans > 1:
        made.append(Rung(-(-made[-1].plans // factor), made[-1].steps * factor))
    return tuple(made)


def halve(
    trials: Sequence[Trial],
    ladder: Sequence[Rung],
    evaluate_at: Callable[[int], Evaluate],
    as_trial: Callable[[Plan, Evaluated], Trial],
    on_trial: Callable[[Trial], None],
    done: Sequence[Trial] = (),
) -> list[Trial]:
    """Climbs the ladder; returns the trials of all rungs, those of the last one at the end.

    Args:
        trials: of the search, all of one fidelity.
        ladder: from `rungs`.
        evaluate_at: steps -> the evaluation that trains a plan for so many.
        as_trial: a plan and what came of it -> the trial, reward and all.
        on_trial: takes each new trial.
        done: trials of an earlier, interrupted climb; they are not run again.
    """
    known = {(trial.fidelity, trial.plan.key): trial for trial in done}
    climbed: list[Trial] = []
    for rung in ladder:
        below = climbed if climbed else list(trials)
        if all(trial.failed for trial in below):
            break  # trained for longer, all of them diverged: the search's own trials stand
        plans, here = best_plans(below, rung.plans), []
        measured = evaluate_at(rung.steps).in_order([plan for plan in plans if (rung.steps, plan.key) not in known])
        for plan in plans:
            trial = known.get((rung.steps, plan.key))
            if trial is None:
                trial = replace(as_trial(plan, next(measured)), fidelity=rung.steps)
                on_trial(trial)
            here.append(trial)
        climbed = [*climbed, *here]
    return climbed


def best_plans(trials: Sequence[Trial], count: int) -> list[Plan]:
    """The best plans (`Trial.rank`) of the highest fidelity, each once; earlier ones first among equals.

    Raises:
        NumericalError: all trials failed.
    """
    top = of_highest_fidelity(succeeded(trials))
    plans = [trial.plan for trial in sorted(top, key=lambda trial: trial.rank, reverse=True)]
    return list({plan.key: plan for plan in plans}.values())[:count]


def of_highest_fidelity(trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose rewards may be compared to find the best."""
    most = max((trial.fidelity for trial in trials), default=0)
    return [trial for trial in trials if trial.fidelity == most]
