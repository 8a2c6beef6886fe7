"""The stage that puts a plan on its target by measurement: neither slower than asked, nor pruned for more than that.

A latency table is off by some percent, and a target is over an engine that only the clock knows. So the plan is moved,
all its sparsities by one amount and then layer by layer, until the repacked model is measured to be on the target.
Nothing is trained for it: what a model takes depends on where its zeros are, not on its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from autoprune.envs.limits import Limit
from autoprune.envs.problem import Problem
from autoprune.envs.projection import ALLOW_MORE, freed, shift
from autoprune.errors import InfeasibleTarget
from autoprune.pipeline.baselines import REPACKED, Baselines
from autoprune.pipeline.gauge import Reached
from autoprune.plan import Plan
from autoprune.target import Target

HIGHEST = 1.03  # of the target: a plan that is so much better is pruned for nothing
LEAST = 0.97  # of the target: less is no noise of the clock
AIM = 1.013  # of the target: the next table may find it a percent slower
RESERVE = 1.08  # of the best that was measured: a figure that is offered must hold when it is asked for
FINE_GRID = 1000  # of sparsities: where all layers are at 90%, one more percent of each is 10% of the work
STEP = 0.02  # of one layer's sparsity, that is looked for between too slow and fast enough
MEASUREMENTS = 10  # of one plan's correction by one amount, and as many again layer by layer
DOUBT = 1.15  # a target is measured to be in reach where the table's best is less than so much above it
_REACH = 6.0  # of the shift, in logits, either way


@dataclass(frozen=True)
class Corrected:
    """A plan on its target.

    Attributes:
        plan: as it is applied.
        reached: what its repacked model was measured to reach.
        measurements: how many that took.
    """

    plan: Plan
    reached: Reached
    measurements: int

    @property
    def remark(self) -> str | None:
        """Why it is pruned for more than the target; None where it is not, or where none was found that meets it."""
        above = self.reached.least - 1.0
        if above <= HIGHEST - 1.0:
            return None
        return (
            f"of {self.measurements} plans measured none lies between the target and {100 * above:.0f}% above it: "
            "kernels become faster in steps"
        )


def correct(plan: Plan, measure: Callable[[Plan], Reached], problem: Problem) -> Corrected:
    """Moves a plan onto the target: the least pruned one that is measured to meet it.

    All sparsities are shifted by one amount in logit space. What was too slow and what was fast enough close in on the
    amount from both sides; in between the latency table says where to look. Where kernels of several layers become
    faster at one amount, no amount is on the target: layers are then given weights back one at a time.

    Args:
        plan: of a search, or of a rule.
        measure: what a plan's repacked model reaches.
        problem: the target, the layers and their table.

    Returns:
        The plan nearest above the target; where none of those measured meets it, the one nearest below.
    """
    tries = _Tries(measure)
    _shift_onto(plan, tries, problem)
    if tries.nearest.reached.least > HIGHEST:
        _give_back(tries, problem)
    return replace(tries.nearest, measurements=len(tries.done))


class _Tries:
    """The plans that one correction measured, each once."""

    def __init__(self, measure: Callable[[Plan], Reached]) -> None:
        self._measure = measure
        self.done: dict[str, Corrected] = {}

    def __call__(self, plan: Plan) -> float:
        """What a plan reaches of the target."""
        if plan.key not in self.done:
            self.done[plan.key] = Corrected(plan, self._measure(plan), len(self.done) + 1)
        return self.done[plan.key].reached.least

    @property
    def nearest(self) -> Corrected:
        """The plan nearest above the target; where all are below it, the one nearest below."""
        met = [each for each in self.done.values() if each.reached.least >= 1.0]
        if met:
            return min(met, key=lambda each: each.reached.least)
        return max(self.done.values(), key=lambda each: each.reached.least)


def _shift_onto(plan: Plan, tries: _Tries, problem: Problem) -> None:
    """Tries plans whose layers are all shifted by one amount, until one is on the target."""
    moved = partial(_moved, plan, problem)
    below: tuple[float, float] | None = None  # the highest shift that was too slow, and what it reached
    above: tuple[float, float] | None = None  # the lowest that was fast enough
    amount = 0.0
    for count in range(1, MEASUREMENTS + 1):
        candidate = plan if amount == 0.0 else moved(amount)
        if candidate.key in tries.done:
            return  # the grid of sparsities is no finer
        reached = tries(candidate)
        if 1.0 <= reached <= HIGHEST:
            return
        if reached < 1.0:
            below = (amount, reached)
        else:
            above = (amount, reached)
        if below is not None and above is not None:
            amount = _between(below, above, halve=count % 3 == 0)
        else:
            amount = _beyond(moved, problem, candidate, reached, amount)


def _give_back(tries: _Tries, problem: Problem) -> None:
    """Gives the nearest plan weights back, one layer after another, as long as the target is still met.

    The layers that save the most time come first: they have the most to give. It ends where no layer's kernels have a
    step between what is too slow and what is fast enough.
    """
    start, table = tries.nearest.plan, problem.table
    saved = {
        name: table.whole_us(name) - table.layer_us(name, layer.curve, layer.sparsity)
        for name, layer in start.layers.items()
    }
    last = len(tries.done) + MEASUREMENTS
    for name in sorted(saved, key=lambda each: -saved[each]):
        enough, too_little = start.layers[name].sparsity, 0.0
        while enough - too_little > STEP:
            between = _in_layer(tries.nearest, name, too_little, enough, problem)
            reached = tries(freed(tries.nearest.plan.with_sparsities({name: between}), problem))
            if reached >= 1.0:
                enough = between
            else:
                too_little = between
            if 1.0 <= reached <= HIGHEST or len(tries.done) >= last:
                return


def _in_layer(best: Corrected, name: str, too_little: float, enough: float, problem: Problem) -> float:
    """The sparsity of a layer at which the table, corrected by what was measured, sees the target."""
    predict, plan = problem.table.predict_speedup, best.plan
    wanted = predict(plan) * AIM / best.reached.least
    left, right = too_little, enough
    for _ in range(10):
        middle = (left + right) / 2
        left, right = (left, middle) if predict(plan.with_sparsities({name: middle})) >= wanted else (middle, right)
    inside = 0.2 * (enough - too_little)
    return round(min(enough - inside, max(too_little + inside, right)) * FINE_GRID) / FINE_GRID


def further(plan: Plan, reached: Reached, measure: Callable[[Plan], Reached], problem: Problem) -> Corrected:
    """Moves a plan whose trained, repacked model misses the target, so that the model trained by it meets it.

    What training changes (the shares that a method finds itself, what runs fastest) is taken to be the same factor
    for plans nearby.

    Args:
        plan: the model's.
        reached: by the trained model.
        measure: what a plan's repacked model reaches untrained.
        problem: the target, the layers and their table.

    Returns:
        As `correct`; the plan is the same where there is no plan nearer the target.
    """
    before = measure(plan)
    lost = {name: value / before.of_target[name] for name, value in reached.of_target.items()}

    def as_trained(candidate: Plan) -> Reached:
        untrained = before if candidate == plan else measure(candidate)
        return replace(untrained, of_target={name: x * lost[name] for name, x in untrained.of_target.items()})

    return correct(plan, as_trained, problem)


def _moved(plan: Plan, problem: Problem, amount: float) -> Plan:
    return freed(shift(plan, amount, problem.max_sparsity, FINE_GRID), problem)


def _between(below: tuple[float, float], above: tuple[float, float], *, halve: bool) -> float:
    """The shift between two that is nearest the target if the speed-up grows exponentially; now and then the middle."""
    (low, slow), (high, fast) = below, above
    share = math.log(AIM / slow) / math.log(fast / slow)
    return low + (high - low) * (0.5 if halve else min(0.95, max(0.05, share)))


def _beyond(moved: Callable[[float], Plan], problem: Problem, candidate: Plan, reached: float, amount: float) -> float:
    """The shift, further than `amount`, at which the table, corrected by what was measured, sees the target."""
    further_by = math.copysign(_REACH, 1.0 - reached)
    if not problem.target.timed:
        return amount + further_by * (0.05 if abs(amount) < _REACH else 1.0)
    wanted = problem.table.predict_speedup(candidate) * AIM / reached
    left, right = sorted((amount, amount + further_by))
    for _ in range(20):
        middle = (left + right) / 2
        left, right = (left, middle) if problem.table.predict_speedup(moved(middle)) >= wanted else (middle, right)
    step = max(abs(right - amount), 0.05)
    return amount + math.copysign(min(step, _REACH), further_by)


def check_reached(corrected: Corrected, problem: Problem) -> None:
    """Refuses a speed-up or a time that a plan could not be moved onto, before anything is trained for it.

    Raises:
        InfeasibleTarget: with the best figure that was measured, less what the clock may be off by.
    """
    timed = [value for name, value in corrected.reached.of_target.items() if name in ("speedup", "latency_ms")]
    if min(timed, default=1.0) < LEAST:
        highest = max((layer.sparsity for layer in corrected.plan.layers.values()), default=0.0)
        raise InfeasibleTarget(
            _out_of_reach(problem, corrected.reached, f"with layers at sparsities up to {highest:g}")
        )


def check_reachable(problem: Problem, most_pruned: Sequence[Plan], measure: Callable[[Plan], Reached]) -> float:
    """Refuses a target that the most pruned model is measured to miss.

    Args:
        problem: the target.
        most_pruned: the plan of `max_sparsity` everywhere, under each pattern that there is a choice of.
        measure: what a plan's repacked model reaches; only asked for where the table leaves a doubt.

    Returns:
        How many times faster than the table says the most pruned model is: 1, but for where the table would refuse
        what the clock found in reach.

    Raises:
        InfeasibleTarget: with the best figure, measured, less what the clock may be off by: asking for it will do.
    """
    required = problem.required_speedup
    if required is None:
        return 1.0
    plans = sorted(most_pruned, key=problem.table.predict_speedup, reverse=True)
    predicted = problem.table.predict_speedup(plans[0])
    if predicted > required * DOUBT:
        return 1.0
    best = max((measure(plan) for plan in plans[:2]), key=lambda each: each.least)
    if best.least < 1.0:
        everywhere = f"with every layer at sparsity {problem.max_sparsity:g}"
        raise InfeasibleTarget(_out_of_reach(problem, best, everywhere))
    return max(1.0, required * best.least / predicted)


def _out_of_reach(problem: Problem, best: Reached, how: str) -> str:
    target, speed = problem.target, best.of_target.get("speedup", math.inf)
    if speed < best.of_target.get("latency_ms", math.inf) and best.speedup is not None:
        safe = math.floor(best.speedup / RESERVE * 100) / 100
        return (
            f"no plan reaches {target.speedup:g}x over {problem.baseline_name} here: {how} the repacked model "
            f"was measured {best.speedup:.2f}x as fast. Ask for at most {safe:g}x, {ALLOW_MORE}"
        )
    safe_ms = (best.latency_ms or 0.0) * RESERVE
    return (
        f"no plan takes at most {target.latency_ms:g} ms here: {how} the repacked model was measured to take "
        f"{best.latency_ms:.4g} ms. Ask for at least {safe_ms:.4g} ms, {ALLOW_MORE}"
    )


def free_without_pruning(target: Target, limits: Sequence[Limit], nothing: Plan, baselines: Baselines) -> str | None:
    """What repacking alone gives, where that meets the target, so that nothing has to be pruned; else None.

    Args:
        target: of the run.
        limits: those of its figures that add up over layers.
        nothing: the plan that keeps all weights.
        baselines: of the dense model.
    """
    if not target.limits or not all(limit.keeps(nothing) for limit in limits):
        return None
    if target.latency_ms is not None and baselines.ms[REPACKED] > target.latency_ms:
        return None
    if target.size_bytes is not None and baselines.file_bytes > target.size_bytes:
        return None
    if target.speedup is None:
        return f"{baselines.ms[REPACKED]:.4g} ms and {baselines.file_bytes:,} bytes are there"
    over = baselines.repacked / baselines.over_reference(target.over)
    return f"{over:.2f}x over {baselines.name(target.over)} is there" if over >= target.speedup else None
