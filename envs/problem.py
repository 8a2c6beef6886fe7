"""What an episode is about: a model's layers, their measured curves, a target, and how a plan is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from autoprune.envs.curves import Curves
from autoprune.envs.limits import FileSize, Limit, limits_of
from autoprune.evaluation.measurement import Evaluate
from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import Inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.precision import OfLayer, RunPrecision, choices_of_layers
from autoprune.registry import Choice
from autoprune.target import Over, Target, baseline_name


@dataclass(frozen=True)
class Problem:
    """One task: model, data and target, reduced to what an agent needs.

    Attributes:
        dense_score: the dense model's, on the validation split.
        evaluate: plan -> Measurement; the expensive part of an episode.
        pattern: the pattern of layers whose pattern no action sets; likewise `criterion`.
        training: the sparse-training method of plans whose method no action sets.
        max_sparsity: the highest sparsity of any layer.
        baseline_speedup: how many times faster than the reference that runs which the target's speed-up is over.
        file: what is known of the packed file's size.
        precision: of the repacked model; with ``planned`` plans choose each layer's.
        layer_precision: of layers whose precision neither an action nor the solver chooses, where plans choose it.
        reference: what measured speed-ups are over.
        curves: what every layer takes and loses at every sparsity.
    """

    inventory: Inventory
    table: LatencyTable
    sensitivity: Sensitivity
    dense_score: float
    evaluate: Evaluate
    target: Target
    pattern: Choice
    criterion: Choice
    training: Choice
    max_sparsity: float = 0.95
    baseline_speedup: float = 1.0
    file: FileSize = field(default_factory=FileSize)
    precision: RunPrecision = "float32"
    layer_precision: OfLayer = "float32"
    reference: Over = "eager"
    curves: Curves = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # made when left out

    def __post_init__(self) -> None:
        """Copies of a problem with another target or evaluation share its curves."""
        if self.curves is None or not self.curves.are_of(self.inventory, self.table, self.sensitivity):
            object.__setattr__(self, "curves", Curves(self.inventory, self.table, self.sensitivity))

    @property
    def precisions(self) -> tuple[OfLayer, ...]:
        """What a plan's layer may be."""
        return choices_of_layers(self.precision)

    @cached_property
    def required_speedup(self) -> float | None:
        """The speed-up that is asked for, over the reference as measurements are; None where none is."""
        speedup, latency_ms = self.target.speedup, self.target.latency_ms
        required = [] if speedup is None else [speedup * self.baseline_speedup]
        required += [] if latency_ms is None else [self.table.dense_ms / latency_ms]
        return max(required, default=None)

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """What a plan must keep beside its time."""
        return limits_of(self.target, self.inventory, self.file)

    def speedup_text(self, over_reference: float) -> str:
        """A measured speed-up as people read it: over what the target's is over."""
        baseline = 1.0 if self.target.speedup is None else self.baseline_speedup
        return f"{over_reference / baseline:.2f}x over {self.baseline_name}"

    @property
    def baseline_name(self) -> str:
        """What the target's speed-up is over, the reference where none is asked for, as people read it."""
        return baseline_name(self.reference if self.target.speedup is None else self.target.over, self.precision)

    def at(self, speedup: float) -> Problem:
        """The same problem, asked for a speed-up over the reference alone."""
        return replace(self, target=Target(speedup=speedup, over=self.reference), baseline_speedup=1.0)

    def meets(self, plan: Plan) -> bool:
        """Whether a plan keeps every limit, its time as the latency table predicts it."""
        required = self.required_speedup
        fast = required is None or self.table.predict_speedup(plan) >= required
        return fast and all(limit.keeps(plan) for limit in self.limits)

    def uniform(self, sparsity: float) -> Plan:
        """The plan that treats every layer alike."""
        layer = LayerPlan(sparsity, self.pattern, self.criterion, self.layer_precision)
        return Plan(dict.fromkeys(self.inventory.names, layer), self.training)
