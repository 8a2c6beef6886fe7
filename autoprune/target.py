"""What a run is asked for: a speed-up, a drop of the accuracy (or whatever the score is), or a sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.errors import ConfigError
from autoprune.metric import Metric, number


@dataclass(frozen=True)
class Target:
    """Exactly one of the three is given.

    Attributes:
        speedup: end-to-end, over the dense model in torch eager under the same protocol; above 1.
        accuracy_drop: how much worse the validation score may get, in (0, 1): a fraction of accuracy, or bits per
            character, as the task's metric is.
        sparsity: share of zeros of the planned layers, in (0, 1).
    """

    speedup: float | None = None
    accuracy_drop: float | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.speedup, self.accuracy_drop, self.sparsity)) != 1:
            raise ConfigError("a target is 'speedup', 'accuracy_drop' or 'sparsity': give exactly one of them.")
        for name, value in vars(self).items():
            if value is not None and number(value) is None:
                raise ConfigError(f"target.{name} is a number, not {value!r:.60}.")
        if self.speedup is not None and not 1.0 < self.speedup < 1000.0:
            raise ConfigError(f"target.speedup must be above 1 (and below 1000), not {self.speedup}.")
        if self.accuracy_drop is not None and not 0.0 < self.accuracy_drop < 1.0:
            raise ConfigError(
                f"target.accuracy_drop is in (0, 1), e.g. 0.01 for one point of accuracy, not {self.accuracy_drop}."
            )

        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"target.sparsity is a fraction in (0, 1), e.g. 0.9, not {self.sparsity}.")

    def text(self, metric: Metric) -> str:
        """The target as people read it, of a task of this metric."""
        if self.sparsity is not None:
            return f"{100 * self.sparsity:g}% sparsity, best {metric.name}"
        if self.speedup is not None:
            return f"at least {self.speedup:g}x faster, best {metric.name}"
        return f"at most {metric.allowance(self.accuracy_drop or 0.0)} worse, fastest"
