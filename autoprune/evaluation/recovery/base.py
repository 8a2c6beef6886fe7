"""What a recovery is, and what it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from autoprune.criteria import LayerStatistics
from autoprune.latency.table import LatencyTable
from autoprune.masks import Masks, make_masks
from autoprune.model.inventory import Inventory
from autoprune.plan import Plan
from autoprune.precision import RunPrecision
from autoprune.progress import SILENT, Progress
from autoprune.repack import CaptureError, Graph, capture
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task

Budget = Literal["weights", "macs", "latency"]


@dataclass(frozen=True)
class Subject:
    """What is pruned and scored: a task, its trained dense model, and what calibration saw of its layers.

    `settings` are the run's fine-tuning settings; `seed` makes any training repeatable. `budget` is what a plan's
    training counts where its method finds the layers' shares; ``latency`` needs `table`. `precision` is that of the
    repacked models, or ``planned``. `progress` is where a long recovery is shown. `captured` is what `graph` remembers;
    copies made with `dataclasses.replace` share it.
    """

    task: Task
    dense: nn.Module
    inventory: Inventory
    statistics: Mapping[str, LayerStatistics]
    settings: TrainingSettings
    seed: int
    budget: Budget = "weights"
    precision: RunPrecision = "float32"
    table: LatencyTable | None = None
    progress: Progress = SILENT
    captured: dict[int, Graph | None] = field(default_factory=dict, repr=False, compare=False)  # by batch

    def graph(self, batch: int) -> Graph | None:
        """The dense model's graph, captured once for all evaluations; None where it cannot be captured.

        Raises:
            CaptureError: it cannot be, and the precision is for whole programs alone.
        """
        if batch not in self.captured:
            try:
                self.captured[batch] = capture(self.dense, self.task.example_inputs(batch))
            except CaptureError as error:
                if self.precision != "float32":
                    raise CaptureError(
                        f"precision {self.precision!r} is for whole programs, and this model is none: {error} "
                        "Take precision = 'float32', or make torch.export accept the model."
                    ) from error
                self.captured[batch] = None
        return self.captured[batch]

    def masks(self, plan: Plan) -> Masks:
        return make_masks(self.dense, self.inventory, plan, self.statistics)


class Recovery(ABC):
    """Turns a plan into a masked model worth scoring.

    Attributes:
        trains: whether the plan's method trains the model.
        steps: of the optimizer, that it takes for a plan.
    """

    trains: ClassVar[bool] = False
    steps: int = 0

    def check_criteria(self, names: Iterable[str]) -> None:  # noqa: B027 - most do with all
        """Raises ConfigError where the recovery cannot do with one of these criteria."""

    @abstractmethod
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        """Masks `model`, a fresh copy of the dense one, in place, and lets it recover."""
