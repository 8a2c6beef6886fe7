"""What an evaluated plan is known by, and the cache that never evaluates one twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoprune.errors import FileError
from autoprune.files import append_line, read_lines
from autoprune.latency.table import LatencyTable
from autoprune.plan import Plan


@dataclass(frozen=True)
class Measurement:
    """One plan under the run's protocol.

    Attributes:
        score: on the validation split after the stated recovery; higher is better.
        latency_ms: median of the whole repacked model, milliseconds.
        speedup: over the dense model in torch eager, timed in turns with it.
    """

    score: float
    latency_ms: float
    speedup: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Evaluate(ABC):
    """An evaluation: one plan, or many at once where the member has workers for them."""

    @abstractmethod
    def __call__(self, plan: Plan) -> Measurement:
        """Evaluates one plan."""

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Measurement]]:
        """Evaluates all; yields (index of the plan, its measurement) as soon as each is there, in any order."""
        for index, plan in enumerate(plans):
            yield index, self(plan)

    def in_order(self, plans: Sequence[Plan]) -> Iterator[Measurement]:
        """Evaluates all; yields the measurements in the plans' order, each once those before it are there."""
        found: dict[int, Measurement] = {}
        upcoming = 0
        for index, measured in self.as_done(plans):
            found[index] = measured
            while upcoming in found:
                yield found.pop(upcoming)
                upcoming += 1

    def all(self, plans: Sequence[Plan]) -> list[Measurement]:
        """Evaluates all; the measurements in the plans' order."""
        return list(self.in_order(plans))


@dataclass(frozen=True)
class ByTable(Evaluate):
    """Wraps an evaluation: its score, and the latency that a table predicts, whichever table that is by now."""

    evaluate: Evaluate
    table: LatencyTable

    def __call__(self, plan: Plan) -> Measurement:
        return self._predicted(plan, self.evaluate(plan))

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Measurement]]:
        for index, measured in self.evaluate.as_done(plans):
            yield index, self._predicted(plans[index], measured)

    def _predicted(self, plan: Plan, measured: Measurement) -> Measurement:
        return replace(measured, latency_ms=self.table.predict_ms(plan), speedup=self.table.predict_speedup(plan))


class CachedEvaluate(Evaluate):
    """Wraps an evaluation so that equal plans are evaluated once, in a resumed run too.

    Args:
        evaluate: the evaluation.
        path: a file of JSON lines that remembers across processes; None remembers in memory alone.
    """

    def __init__(self, evaluate: Evaluate, path: Path | None = None) -> None:
        self._evaluate, self._path = evaluate, path
        lines = read_lines(path, "the record of evaluated plans") if path is not None else []
        try:
            self._known = {
                str(line["key"]): Measurement(float(line["score"]), float(line["latency_ms"]), float(line["speedup"]))
                for line in lines
            }
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the record of evaluated plans is corrupt: {path} ({error}). Delete it.") from None

    def __call__(self, plan: Plan) -> Measurement:
        key = plan.key
        if key not in self._known:
            self._remember(key, self._evaluate(plan))
        return self._known[key]

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Measurement]]:
        """Evaluates those that are unknown, equal ones once; each is on disk before it is yielded."""
        waiting: dict[str, list[int]] = {}
        for index, plan in enumerate(plans):
            waiting.setdefault(plan.key, []).append(index)
        unknown = [plans[indices[0]] for key, indices in waiting.items() if key not in self._known]
        for key, indices in waiting.items():
            if key in self._known:
                yield from ((index, self._known[key]) for index in indices)
        for position, measured in self._evaluate.as_done(unknown):
            key = unknown[position].key
            self._remember(key, measured)
            yield from ((index, measured) for index in waiting[key])

    def _remember(self, key: str, measured: Measurement) -> None:
        self._known[key] = measured
        if self._path is not None:
            append_line(self._path, {"key": key, **measured.to_json()})
