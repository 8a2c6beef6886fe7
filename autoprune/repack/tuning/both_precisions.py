"""Which layers take less time in bfloat16 numbers than in floats: both forms timed in turns, where they will run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection

import torch
from torch import Tensor

from autoprune.latency.quiet import timing
from autoprune.latency.timer import Clock
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import NativeStep
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.runtime.program import Program, shapes_of
from autoprune.repack.tuning.tuning import ROUNDS, Tuned, TuningCache

TURNS = 3 * ROUNDS  # that each form of a layer is run


def gains(
    programs: tuple[Program, Program], tuned: tuple[Tuned, Tuned], layers: Collection[str], inputs: tuple[Tensor, ...],
    cache: TuningCache, clock: Clock = time.perf_counter,
) -> dict[str, float]:  # fmt: skip
    """Layer -> its time in floats as a multiple of that in bfloat16 numbers; layers with nothing to do are left out.

    What brings a layer's input into the layout that it reads counts, rounding too. One thread computes, whatever the
    programs' threads.

    Args:
        programs: in floats and in bfloat16 numbers, tuned for one thread or several; timed on one.
        tuned: what was found for each of the two.
        layers: that differ, by their output.
        inputs: example inputs.
        cache: what is known already; new findings are added and saved.
        clock: seconds.
    """
    keys = {name: json.dumps([each.keys[name] for each in tuned]) for name in layers if name in tuned[0].keys}
    unknown = [name for name in keys if keys[name] not in cache.bf16_gains]
    if unknown:
        forms = [_Form(program, inputs) for program in programs]
        with timing():  # what is found is remembered: it must not be a neighbour's noise
            for name in unknown:
                floats, halves = _least_seconds([(form.layer(name), form.slots) for form in forms], clock)
                cache.bf16_gains[keys[name]] = floats / halves
        cache.changed = True
        cache.save()
    return {name: cache.bf16_gains[key] for name, key in keys.items()}


class _Form:
    """A program that has run once, so that every layer has an input."""

    def __init__(self, program: Program, inputs: tuple[Tensor, ...]) -> None:
        self._program, plan = program, program.plan(shapes_of(inputs))
        self._frame = plan.frame()
        with torch.inference_mode():
            plan.run_in(self._frame, inputs)
        plan.fill(self._frame, inputs)
        self.slots = int(self._frame.slots.ctypes.data)
        self._steps = [step for step in plan.lowered.steps if isinstance(step, NativeStep)]

    def layer(self, name: str) -> NativeSequence:
        """A layer, behind the steps that make what it reads of values in other layouts."""
        own = next(step for step in self._steps if step.name == name and step.layer is not None)
        steps, wanted = [own], set(own.reads)
        for step in reversed(self._steps[: self._steps.index(own)]):  # as far back as to what an operation makes
            if step.op is None and step.writes in wanted:
                steps.insert(0, step)
                wanted |= set(step.reads)
        weights, tilings = self._program.weights, self._program.tilings
        return NativeSequence([step.build(weights.get(step.name), tilings.get(step.name, Tiling())) for step in steps])


def _least_seconds(forms: list[tuple[NativeSequence, int]], clock: Clock) -> list[float]:
    """The least time of each, in turns."""
    best = [math.inf] * len(forms)
    for _ in range(TURNS):
        for number, (sequence, slots) in enumerate(forms):
            start = clock()
            sequence.run(slots)
            best[number] = min(best[number], clock() - start)
    return best
