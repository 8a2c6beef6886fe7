"""The evaluation of a plan: mask, recover, score, repack, and time end to end in turns with the dense model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from autoprune.errors import GivenError, NumericalError
from autoprune.evaluation.devices import Candidate, Device
from autoprune.evaluation.devices.process import HERE
from autoprune.evaluation.measurement import Evaluate, Evaluated, Failure, Measurement
from autoprune.evaluation.recovery import Recovery, Subject
from autoprune.latency.quiet import working
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Clock, Latency, Protocol, speedup, torch_threads
from autoprune.model.recurrent.names import GATES
from autoprune.plan import Plan
from autoprune.repack import LayerForm, RepackedModel, quantize_, repack

TIMINGS = 5  # of one plan, at most
AGREE = 0.1  # how far a speed-up may be from the table's to be believed at once
STEADY = 0.05  # how far the median round may be from the fastest rounds, which nothing disturbed
REPEAT = 0.05  # how far two timings of one model may be apart to be believed
Timing = tuple[float, float]  # of a plan: its speed-up, and milliseconds
_NUMERIC = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # it is documented there


@contextmanager
def _numeric() -> Iterator[None]:
    """Turns numeric errors into one kind: they end a trial, not the search."""
    try:
        yield
    except _NUMERIC as error:
        raise NumericalError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Evaluator(Evaluate):
    """Callable: plan -> Measurement, or the Failure of one that diverged or could not be evaluated.

    Deterministic but for the clock.

    Attributes:
        protocol: the timing of one trial.
        batch: batch size of the timed inference.
        work_threads: torch threads while training and scoring (timing has the protocol's).
        timed: whether a plan's latency is measured; else the table predicts it, and nothing is repacked.
        device: that measures it.
    """

    subject: Subject
    table: LatencyTable
    recovery: Recovery
    protocol: Protocol
    batch: int = 1
    work_threads: int = 1
    clock: Clock = time.perf_counter
    timed: bool = True
    device: Device = HERE

    def masked_model(self, plan: Plan) -> nn.Module:
        """The dense model, masked by `plan` and recovered.

        Raises:
            NumericalError: the recovery diverged.
            GivenError: the loss or a batch failed while it trained.
        """
        model = copy.deepcopy(self.subject.dense)
        with torch_threads(self.work_threads), _numeric():
            self.recovery.recover_(model, plan, self.subject)
        if diverged := [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]:
            raise NumericalError(f"recovery {type(self.recovery).__name__} diverged: {diverged[0]} is not finite.")
        return model.eval()

    def repacked(self, model: nn.Module, plan: Plan) -> RepackedModel:
        """Repacks for the measurement: as a program, or with the backends the latency table found fastest."""
        task, precision = self.subject.task, plan.precision_in(self.subject.precision)
        inputs, calibration = task.example_inputs(self.batch), task.calibration_inputs(precision)
        with torch_threads(self.protocol.threads):
            graph = self.subject.graph(self.batch)
            if graph is None:
                return repack(model, inputs, choose=self.chooser(plan))
            # the method may have widened it
            alike = [x.shape for x in model.parameters()] == [x.shape for x in self.subject.dense.parameters()]
            known = graph if alike else None
            return repack(model, inputs, precision=precision, calibration=calibration, graph=known, clock=self.clock)

    def chooser(self, plan: Plan) -> TableChoice:
        return TableChoice(self.table, plan)

    def __call__(self, plan: Plan) -> Evaluated:
        try:
            with working():
                model = self.masked_model(plan)
                if not self.timed:
                    return self.predicted(model, plan)
                score, fast = self.scored(model, plan)
        except (GivenError, NumericalError) as error:
            return Failure(str(error), error.__cause__ or error)
        return self.measured(score, fast, plan)

    def predicted(self, model: nn.Module, plan: Plan) -> Measurement:
        """The score of `plan`'s masked model, and the table's latency.

        Layers that the plan has in int8 are fake-quantised: what that costs is part of the choice.
        """
        precision, task = plan.precision_in(self.subject.precision), self.subject.task
        if isinstance(precision, Mapping):
            calibration = task.positional_calibration()
            quantize_(model, task.example_inputs(self.batch), calibration, precision=precision)
        score = self.score(model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]  # sooner so
        return Measurement(score, self.table.predict_ms(plan), self.table.predict_speedup(plan))

    def scored(self, model: nn.Module, plan: Plan) -> tuple[float, RepackedModel]:
        """The score of `plan`'s masked model, and the model repacked: what is safe beside other work."""
        fast = self.repacked(model, plan)
        # The repacked model is scored: it gives the masked one's output, sooner.
        return self.score(fast), fast

    def measured(self, score: float, fast: RepackedModel, plan: Plan) -> Measurement:
        """Times a repacked model that scored `score`, again where the clock cannot be trusted.

        A timing is believed that was steady, and that the latency table predicts or another timing of the same model
        repeats: what disturbs a busy machine disturbs no two of them alike. Where none is, the fastest rounds count.
        """
        predicted, steady, fastest = self.table.predict_speedup(plan), list[Timing](), list[Timing]()
        for _ in range(TIMINGS):
            dense, packed = self.time(fast)
            fastest.append((dense.p10_ms / packed.p10_ms, packed.p10_ms))
            ratio = speedup(dense, packed)
            if abs(ratio / fastest[-1][0] - 1.0) <= STEADY:
                steady.append((ratio, packed.median_ms))
                if (believed := _believed(steady, predicted)) is not None:
                    break
        else:
            believed = sorted(fastest)[len(fastest) // 2]
        return Measurement(score, believed[1], believed[0], timings=len(fastest))

    def score(self, model: nn.Module) -> float:
        """On the validation split.

        Raises:
            NumericalError: it is no finite number.
            GivenError: the evaluation raised something.
        """
        with torch_threads(self.work_threads):
            return self.subject.task.evaluate(model)

    def time(self, fast: RepackedModel, baseline: Candidate | None = None) -> tuple[Latency, Latency]:
        """Latency of a baseline, the device's `reference` by default, and of a repacked model, interleaved.

        Raises:
            DeviceError: the device failed.
        """
        inputs, dense = self.subject.task.example_inputs(self.batch), self.subject.dense
        slow = baseline
        if slow is None:
            slow = self.device.reference(dense, inputs, lambda: self.repacked(dense, Plan({})))
        times = self.device.time({"baseline": slow, "repacked": fast}, inputs, self.protocol, self.clock)
        return times["baseline"], times["repacked"]


def _believed(taken: Sequence[Timing], predicted: float) -> Timing | None:
    """The last of some timings, if the table or an earlier one agrees with it."""
    if abs(taken[-1][0] / predicted - 1.0) <= AGREE:
        return taken[-1]
    slower = slower_of_agreeing([ratio for ratio, _ in taken])
    return None if slower is None else taken[slower]


def slower_of_agreeing(speedups: Sequence[float]) -> int | None:
    """Which of some timings of one model to believe: the last, or an earlier one that agrees with it; else None.

    Of those that agree it is the slowest: nothing makes a model faster than it is.
    """
    last = len(speedups) - 1
    near = [each for each in range(last) if abs(speedups[last] / speedups[each] - 1.0) <= REPEAT]
    return min([*near, last], key=lambda each: speedups[each]) if near else None


@dataclass(frozen=True)
class PairedEvaluator(Evaluate):
    """Measures plans interleaved with a reference plan, both repacked, so that they can be compared with each other.

    Two programs of one kind feel a machine's moods alike, within 2% where either is off by 10% against torch eager.

    Attributes:
        evaluator: masks, recovers, repacks, scores and times.
        reference: the plan that others are timed interleaved with.
        speedup: the reference's, over the dense model; the others' are relative to it.
    """

    evaluator: Evaluator
    reference: Plan
    speedup: float

    def __call__(self, plan: Plan) -> Evaluated:
        try:
            with working():
                score, fast = self.evaluator.scored(self.evaluator.masked_model(plan), plan)
        except (GivenError, NumericalError) as error:
            return Failure(str(error), error.__cause__ or error)
        reference, packed = self._times(fast)
        ratio = 1.0 if plan.key == self.reference.key else speedup(reference, packed)
        return Measurement(score, packed.median_ms, self.speedup * ratio)

    def speedup_of(self, fast: RepackedModel) -> float:
        """That of any repacked model, such as one whose plan was trained.

        Raises:
            DeviceError: the device failed.
        """
        return self.speedup * speedup(*self._times(fast))

    def _times(self, fast: RepackedModel) -> tuple[Latency, Latency]:
        """Of the reference and of a repacked model."""
        with working():
            beside = self._packed
        return self.evaluator.time(fast, beside)

    @cached_property
    def _packed(self) -> RepackedModel:
        return self.evaluator.repacked(self.evaluator.masked_model(self.reference), self.reference)


@dataclass(frozen=True)
class TableChoice:
    """Chooses a layer's backend from the latency table."""

    table: LatencyTable
    plan: Plan

    def __call__(self, name: str, form: LayerForm) -> str:
        if form.kind in GATES:
            return "jit"  # its weights are timed one by one, and no backend else can take them
        if name not in self.table.layers:
            return "dense"
        if name not in self.plan.layers:
            return self.table.layers[name].whole_backend
        layer = self.plan.layers[name]
        return self.table.layers[name].backend(layer.curve, layer.sparsity)
