"""The latency table: microseconds of every layer, pattern and sparsity, measured here with the real kernels.

A table is good for one machine, one batch size and one thread count; `load` refuses it anywhere else.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from autoprune.errors import AutopruneError, FileError, StaleTable, did_you_mean
from autoprune.files import read_json, write_json
from autoprune.latency.machine import differences
from autoprune.plan import Plan, curve_of
from autoprune.registry import Choice

TABLE_VERSION = 3  # of its form and of how it is measured


@dataclass(frozen=True)
class Point:
    """The fastest backend of one layer at one sparsity, and its time in microseconds a call."""

    sparsity: float
    latency_us: float
    backend: str


@dataclass(frozen=True)
class LayerTable:
    """One layer: torch's dense time, and a curve for each pattern and precision, keyed by `curve_of`, sparsity rising.

    The first is of a pattern in float32, or in what all layers of a run are in. A layer that cannot be int8 has the
    same points there as in float32.
    """

    dense_us: float
    calls: int
    curves: Mapping[str, tuple[Point, ...]]

    def curve(self, pattern: str) -> tuple[Point, ...]:
        if pattern not in self.curves:
            raise AutopruneError(
                f"the latency table has no pattern {pattern!r}. {did_you_mean(pattern, self.curves)} "
                "Profile again with the pattern in the config."
            )
        return self.curves[pattern]

    def is_int8(self, pattern: Choice) -> bool:
        """Whether the layer was timed in int8: it can be."""
        return self.curve(curve_of(pattern, "int8")) != self.curve(curve_of(pattern))

    def latency_us(self, pattern: str, sparsity: float) -> float:
        """Time of one call: linear between measured points, never above dense, never rising with sparsity."""
        sparsities, falling = self._lines.get(pattern) or self._line(pattern)
        at = bisect_right(sparsities, sparsity)
        if at == 0:
            return self.dense_us
        if at == len(sparsities):
            return falling[-1]
        share = (sparsity - sparsities[at - 1]) / (sparsities[at] - sparsities[at - 1])
        return falling[at - 1] + share * (falling[at] - falling[at - 1])

    @cached_property
    def _lines(self) -> dict[str, tuple[list[float], list[float]]]:
        return {}

    def _line(self, pattern: str) -> tuple[list[float], list[float]]:
        points = self.curve(pattern)
        falling = list(accumulate((point.latency_us for point in points), min, initial=self.dense_us))[1:]
        self._lines[pattern] = ([point.sparsity for point in points], falling)
        return self._lines[pattern]

    def backend(self, pattern: str, sparsity: float) -> str:
        """The backend that was fastest at the nearest measured sparsity."""
        return min(self.curve(pattern), key=lambda point: abs(point.sparsity - sparsity)).backend

    @property
    def whole_backend(self) -> str:
        """The backend that was fastest with all weights."""
        return next(iter(self.curves.values()))[0].backend


@dataclass(frozen=True)
class LatencyTable:
    """All layers' curves and what joins them to the whole model's time.

    The layers' times add up to the `parts`; what the whole model takes then is read off between whole models that
    were measured end to end when the table was made.

    Attributes:
        dense_ms: the whole dense model in torch eager, milliseconds; repacked, on a device that runs no torch.
        whole: (parts, whole model) of those that were measured, milliseconds, both rising strictly; at least one.
        settings: batch, threads and what else the numbers hold for.
        machine: `latency.machine.machine_identity` of where they were measured.
    """

    layers: Mapping[str, LayerTable]
    dense_ms: float
    whole: tuple[tuple[float, float], ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]

    def whole_ms(self, parts_ms: float) -> float:
        """What the whole model takes whose layers add up to `parts_ms`: linear between measured models.

        Beyond the slowest of them it changes as much as the parts do. Beyond the fastest it falls as much, and no
        further than to what that one took besides its parts.
        """
        return _between(self._line, parts_ms)

    def parts_ms(self, whole_ms: float) -> float:
        """What the layers may add up to for the whole model to take `whole_ms`: the inverse of `whole_ms`.

        Below what the model takes besides its layers it is negative: nothing is so fast.
        """
        return _between([(whole, parts) for parts, whole in self._line], whole_ms)

    @cached_property
    def _line(self) -> tuple[tuple[float, float], ...]:
        """The measured models, and a point on either side."""
        (fast_parts, fast), (slow_parts, slow) = self.whole[0], self.whole[-1]
        none = (0.0, max(0.0, fast - fast_parts))
        return (none, *self.whole, (slow_parts + 1.0, slow + 1.0))

    def scaled(self, factor: float) -> LatencyTable:
        """A table that predicts `factor` times the speed-ups: whole models were measured to be so much faster."""
        return replace(self, dense_ms=self.dense_ms * factor)

    def layer_us(self, name: str, pattern: str, sparsity: float) -> float:
        """Time of all calls of one layer in one inference, microseconds."""
        layer = self.layers[name]
        return layer.calls * layer.latency_us(pattern, sparsity)

    def whole_us(self, name: str) -> float:
        """Time of all calls of one layer with all its weights, by whatever runs it fastest."""
        layer = self.layers[name]
        return layer.calls * layer.latency_us(next(iter(layer.curves)), 0.0)

    def saving_us(self, name: str, sparsity: float) -> float:
        """The most that pruning a layer to `sparsity` can save, over all patterns and precisions."""
        layer = self.layers[name]
        return self.whole_us(name) - layer.calls * min(layer.latency_us(key, sparsity) for key in layer.curves)

    def dense_us(self, name: str) -> float:
        """Time of all calls of one layer as torch runs it."""
        return self.layers[name].calls * self.layers[name].dense_us

    def sum_ms(self, plan: Plan) -> float:
        """What the layers of a plan add up to, milliseconds."""
        return 1e-3 * math.fsum(  # exact, so that a table read from a file, its layers in another order, says the same
            self.layer_us(name, plan.layers[name].curve, plan.layers[name].sparsity)
            if name in plan.layers
            else self.whole_us(name)
            for name in self.layers
        )

    def predict_ms(self, plan: Plan) -> float:
        """Predicted time of the repacked model, milliseconds."""
        return self.whole_ms(self.sum_ms(plan))

    @property
    def unpruned_ms(self) -> float:
        """Predicted time of the repacked model with all its weights, milliseconds."""
        return self.whole_ms(1e-3 * math.fsum(self.whole_us(name) for name in self.layers))

    def predict_speedup(self, plan: Plan) -> float:
        """Predicted speed-up over the dense model in torch eager."""
        return self.dense_ms / self.predict_ms(plan)

    def to_json(self) -> dict[str, Any]:
        return {"version": TABLE_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path, *, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> LatencyTable:
        """Reads a table made for these settings on this machine.

        Raises:
            FileError: the file is missing or not a table.
            StaleTable: it was measured on another machine, with other versions or other settings.
        """
        table = cls._parse(path, read_json(path, "the latency table"))
        changed = differences(table.machine, machine) + differences(table.settings, settings)
        if changed:
            raise StaleTable(
                f"the latency table {path} does not hold here: {'; '.join(changed)}. Its numbers would mislead the "
                "search. Measure again with 'autoprune profile CONFIG --force', or use another run directory."
            )
        return table

    @classmethod
    def _parse(cls, path: Path, data: Any) -> LatencyTable:
        try:
            if data["version"] != TABLE_VERSION:
                raise StaleTable(f"the latency table {path} has version {data['version']!r}, not {TABLE_VERSION}.")
            layers = {
                name: LayerTable(
                    _positive(layer["dense_us"]),
                    int(layer["calls"]),
                    {key: _curve(points) for key, points in layer["curves"].items()},
                )
                for name, layer in data["layers"].items()
            }
            whole = _rising(data["whole"])
            return cls(layers, _positive(data["dense_ms"]), whole, dict(data["settings"]), dict(data["machine"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(
                f"the latency table is corrupt: {path} ({type(error).__name__}: {error}). "
                "Measure again with 'autoprune profile CONFIG --force'."
            ) from None


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"expected a positive number, got {value!r}")
    return number


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through two points or more, whose both sides rise strictly; the ends go on as they are."""
    at = min(max(1, bisect_right(points, x, key=lambda point: point[0])), len(points) - 1)
    (left, low), (right, high) = points[at - 1], points[at]
    return low + (x - left) / (right - left) * (high - low)


def _rising(points: Any) -> tuple[tuple[float, float], ...]:
    whole = tuple((_positive(parts), _positive(ms)) for parts, ms in points)
    if not whole or any(a[0] >= b[0] or a[1] >= b[1] for a, b in pairwise(whole)):
        raise ValueError("the whole models' times must rise")
    return whole


def _curve(points: Any) -> tuple[Point, ...]:
    curve = tuple(Point(float(p["sparsity"]), _positive(p["latency_us"]), str(p["backend"])) for p in points)
    if not curve or any(a.sparsity >= b.sparsity for a, b in pairwise(curve)):
        raise ValueError("a curve's sparsities must rise")
    return curve
