"""What a repacked model reaches of a run's target, by the clock and its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from autoprune.envs.problem import Problem
from autoprune.evaluation.devices import Candidate
from autoprune.evaluation.evaluator import TIMINGS, Evaluator, slower_of_agreeing
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.files import temporary_folder
from autoprune.latency.record import MeasurementRecord
from autoprune.latency.timer import speedup
from autoprune.pipeline.baselines import BASELINES_FILE, Baselines, DenseEngines
from autoprune.pipeline.preparation import Context
from autoprune.plan import Plan
from autoprune.repack import RepackedModel, save
from autoprune.target import Target

GAUGED = "gauged.jsonl"  # in a run's directory: what plans were measured to reach of the target


@dataclass(frozen=True)
class Reached:
    """What a repacked model reaches of each figure of a target.

    Attributes:
        of_target: figure -> what is reached over what was asked; 1 and above: it is met.
        speedup: over what the target's speed-up is over; None where none was asked for.
        latency_ms: median of one inference; None where no time was asked for.
    """

    of_target: Mapping[str, float]
    speedup: float | None = None
    latency_ms: float | None = None

    @property
    def least(self) -> float:
        """Of the figure that is furthest from being met."""
        return min(self.of_target.values())


@dataclass(frozen=True)
class Gauge:
    """Measures a repacked model against a run's target.

    Attributes:
        context: of the run.
        evaluator: of plans, which masks and recovers nothing; its protocol is the final table's.
        problem: the target and the layers it is of.
        baseline: what the target's speed-up is over; None: what the device times plans beside.
        record: keeps what plans reach, so that a stopped correction goes on where it was.
    """

    context: Context
    evaluator: Evaluator
    problem: Problem
    baseline: Candidate | None
    record: MeasurementRecord = field(default_factory=MeasurementRecord)

    @property
    def target(self) -> Target:
        return self.problem.target

    def __call__(self, plan: Plan, model: RepackedModel) -> Reached:
        """Times the model interleaved with the baseline and weighs its file.

        It is timed until two timings agree, and the slower of them counts; of some that never do, the middle one.
        """
        taken: list[Reached] = []
        while len(taken) < (TIMINGS if self.target.timed else 1):
            taken.append(self._once(plan, model))
            if (slower := slower_of_agreeing([each.least for each in taken])) is not None:
                return taken[slower]
        return sorted(taken, key=lambda each: each.least)[len(taken) // 2]

    def of_plan(self, plan: Plan) -> Reached:
        """Of the dense model masked by a plan, repacked; nothing is trained."""
        return self(plan, self.evaluator.repacked(self.evaluator.masked_model(plan), plan))

    def kept(self, stage: str, plan: Plan) -> Reached:
        """As `of_plan`, and remembered for this stage of the run."""
        return Reached(**self.record(f"{stage}: {plan.key}", lambda: asdict(self.of_plan(plan))))

    def _once(self, plan: Plan, model: RepackedModel) -> Reached:
        target, reached = self.target, {limit.name: limit.at_most / limit.cost(plan) for limit in self.problem.limits}
        if target.size_bytes is not None:
            reached["size_bytes"] = target.size_bytes / self._file_bytes(model)
        ratio = latency_ms = None
        if target.timed:
            baseline, packed = self.evaluator.time(model, self.baseline)
            ratio, latency_ms = speedup(baseline, packed), packed.median_ms
        if target.speedup is not None and ratio is not None:
            reached["speedup"] = ratio / target.speedup
        if target.latency_ms is not None and latency_ms is not None:
            reached["latency_ms"] = target.latency_ms / latency_ms
        return Reached(reached, ratio, latency_ms)

    def _file_bytes(self, model: RepackedModel) -> int:
        with temporary_folder() as folder:
            path = folder / "model.safetensors"
            save(model, path, value_bits=self.context.config.repack.value_bits)
            return path.stat().st_size


def gauge(
    context: Context,
    evaluator: Evaluator,
    problem: Problem,
    engines: Callable[[], DenseEngines],
    baselines: Baselines | None,
) -> Gauge:
    """The gauge of a run.

    Args:
        context: of the run.
        evaluator: of plans.
        problem: whose target is measured.
        engines: the dense engines, prepared where the target is over one of them.
        baselines: which of them the target is over; None where it is over none.
    """
    target = problem.target
    protocol = context.final_protocol
    evaluator = replace(evaluator, protocol=protocol, timed=True, recovery=NoRecovery())
    baseline, name = None, context.device.reference_name
    if target.speedup is not None and baselines is not None:
        name = baselines.engine(target.over)
        baseline = engines().call(name, context.directory / BASELINES_FILE)
    latency, asked = context.config.latency.model_dump(mode="json"), target.to_json()
    about = {"machine": context.device.identity(), "latency": latency, "target": asked, "baseline": name}
    record = MeasurementRecord(context.directory / GAUGED, about)
    return Gauge(context, evaluator, problem, baseline, record)
