"""What a run is asked for: limits that the pruned model must keep, and how much worse it may get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from autoprune.errors import ConfigError, did_you_mean
from autoprune.metric import Metric, number
from autoprune.precision import RunPrecision

Over = Literal["best", "repacked", "eager"]
OVER: tuple[Over, ...] = get_args(Over)
_BASELINES: Mapping[Over, str] = {
    "best": "the best dense engine",
    "repacked": "the dense model repacked",
    "eager": "dense torch eager",
}


def baseline_name(over: Over, precision: RunPrecision = "float32") -> str:
    """What a speed-up is over, as people read it.

    Args:
        over: of the target.
        precision: of the repacked model, which says which engines the best one is the best of.
    """
    of_any = " of any precision" if over == "best" and precision != "float32" else ""
    return f"{_BASELINES[over]}{of_any}"


@dataclass(frozen=True)
class Target:
    """What the pruned model must reach; all that is given holds at once.

    Of the models that keep every limit the one with the best score is wanted. An accuracy drop alone asks for the
    fastest model within it; beside limits it is a floor that the final model is checked against.

    Attributes:
        speedup: end to end, over the dense model as `over` says, measured here; above 1.
        accuracy_drop: how much worse the score may get, in (0, 1): a fraction of accuracy, or bits per character, as
            the task's metric is.
        sparsity: share of zeros of the planned layers, in (0, 1).
        latency_ms: at most so many milliseconds an inference, measured here; above 0.
        size_bytes: of the file of the repacked model, at most; above 0.
        macs: multiply-adds of one sample, at most, of the layers that can be pruned; above 0.
        over: what the speed-up is over: the ``best`` dense engine of this machine (in float32; of any precision for a
            model that is repacked in int8), the dense model ``repacked``, or torch ``eager``.

    Raises:
        ConfigError: nothing is asked for, or a figure is out of its range.
    """

    speedup: float | None = None
    accuracy_drop: float | None = None
    sparsity: float | None = None
    latency_ms: float | None = None
    size_bytes: int | None = None
    macs: int | None = None
    over: Over = "best"

    def __post_init__(self) -> None:
        if not self.asked:
            raise ConfigError(f"a target is one or more of {', '.join(map(repr, FIGURES))}: give at least one of them.")
        if self.over not in OVER:
            raise ConfigError(f"target.over is what the speed-up is over. {did_you_mean(str(self.over), OVER)}")
        for name, value in self.asked.items():
            if number(value) is None:
                raise ConfigError(f"target.{name} is a number, not {value!r:.60}.")
        if self.speedup is not None and not 1.0 < self.speedup < 1000.0:
            raise ConfigError(f"target.speedup must be above 1 (and below 1000), not {self.speedup}.")
        if self.accuracy_drop is not None and not 0.0 < self.accuracy_drop < 1.0:
            raise ConfigError(
                f"target.accuracy_drop is in (0, 1), e.g. 0.01 for one point of accuracy, not {self.accuracy_drop}."
            )
        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"target.sparsity is a fraction in (0, 1), e.g. 0.9, not {self.sparsity}.")
        for name in ("latency_ms", "size_bytes", "macs"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"target.{name} must be above 0, not {value}.")

    @property
    def asked(self) -> dict[str, Any]:
        """The figures that are given, by name."""
        return {name: getattr(self, name) for name in FIGURES if getattr(self, name) is not None}

    @property
    def limits(self) -> tuple[str, ...]:
        """The names of the figures that a plan is moved onto: all but the accuracy drop."""
        return tuple(name for name in self.asked if name != "accuracy_drop")

    @property
    def timed(self) -> bool:
        """Whether the clock decides if it is met."""
        return self.speedup is not None or self.latency_ms is not None

    @property
    def measured(self) -> bool:
        """Whether only a measurement of the repacked model tells if it is met: its time, or its file."""
        return self.timed or self.size_bytes is not None

    def to_json(self) -> dict[str, Any]:
        """What differs from an empty target."""
        return self.asked | ({"over": self.over} if self.speedup is not None and self.over != "best" else {})

    def text(self, metric: Metric, precision: RunPrecision = "float32") -> str:
        """The target as people read it, of a task of this metric and a repacked model of this precision."""
        if not self.limits:
            return f"at most {metric.allowance(self.accuracy_drop or 0.0)} worse, fastest"
        texts = {
            "speedup": lambda value: f"at least {value:g}x faster than {baseline_name(self.over, precision)}",
            "sparsity": lambda value: f"{100 * value:g}% sparsity",
            "latency_ms": lambda value: f"at most {value:g} ms",
            "size_bytes": lambda value: f"at most {value:,} bytes",
            "macs": lambda value: f"at most {value:,} multiply-adds",
        }
        limits = " and ".join(texts[name](getattr(self, name)) for name in self.limits)
        floor = f", at most {metric.allowance(self.accuracy_drop)} worse" if self.accuracy_drop is not None else ""
        return f"{limits}{floor}, best {metric.name}"


FIGURES = tuple(field.name for field in fields(Target) if field.name != "over")
