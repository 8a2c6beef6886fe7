"""What an evaluated plan is known by, and the cache that never evaluates one twice."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoprune.errors import FileError
from autoprune.files import append_line, read_lines
from autoprune.latency.table import LatencyTable
from autoprune.metric import number
from autoprune.plan import Plan

FAILED = "failed"  # key, in JSON, of why a plan has no measurement


@dataclass(frozen=True)
class Failure:
    """A plan without a measurement: its training diverged, its score is no number, or what the user gave failed.

    Attributes:
        reason: in a sentence.
        error: what was raised; None in another process than the one that evaluated the plan, or where nothing was.
    """

    reason: str
    error: BaseException | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, (self.reason,)  # a user's error may be no pickle

    def to_json(self) -> dict[str, Any]:
        return {FAILED: self.reason}


@dataclass(frozen=True)
class Measurement:
    """One plan under the run's protocol.

    Attributes:
        score: on the validation split after the stated recovery; higher is better.
        latency_ms: median of the whole repacked model, milliseconds.
        speedup: over the dense model, timed in turns with it: in torch eager, or repacked where torch does not run.
        timings: how often it was timed until the clock could be trusted.
    """

    score: float
    latency_ms: float
    speedup: float
    timings: int = field(default=1, compare=False)

    def to_json(self) -> dict[str, Any]:
        figures = {"score": self.score, "latency_ms": self.latency_ms, "speedup": self.speedup}
        return figures | ({"timings": self.timings} if self.timings > 1 else {})


Evaluated = Measurement | Failure


def checked(given: Any) -> Evaluated:
    """The measurement with its figures as floats, or the failure; a failure in place of anything that is neither.

    A user's own evaluation may give anything.
    """
    if isinstance(given, Failure):
        return given
    if isinstance(given, Measurement):
        figures = [number(each) for each in (given.score, given.latency_ms, given.speedup)]
        score, latency_ms, speedup = (math.nan if each is None else each for each in figures)
        if math.isfinite(score) and math.isfinite(latency_ms) and math.isfinite(speedup) and speedup > 0.0:
            return replace(given, score=score, latency_ms=latency_ms, speedup=speedup)
    return Failure(f"the evaluation gave no usable numbers: {given!r:.300}.")


def evaluated(line: Mapping[str, Any]) -> Evaluated:
    """From its JSON.

    Raises:
        KeyError: something is missing; likewise TypeError and ValueError.
    """
    if FAILED in line:
        return Failure(str(line[FAILED]))
    score, latency_ms, speedup = (float(line[name]) for name in ("score", "latency_ms", "speedup"))
    return Measurement(score, latency_ms, speedup, timings=int(line.get("timings", 1)))


class Evaluate(ABC):
    """An evaluation: one plan, or many at once where the member has workers for them."""

    @abstractmethod
    def __call__(self, plan: Plan) -> Evaluated:
        """Evaluates one plan."""

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Evaluated]]:
        """Evaluates all; yields (index of the plan, what came of it) as soon as each is there, in any order."""
        for index, plan in enumerate(plans):
            yield index, self(plan)

    def in_order(self, plans: Sequence[Plan]) -> Iterator[Evaluated]:
        """Evaluates all; yields what came of them in the plans' order, each once those before it are there."""
        found: dict[int, Evaluated] = {}
        upcoming = 0
        for index, measured in self.as_done(plans):
            found[index] = measured
            while upcoming in found:
                yield found.pop(upcoming)
                upcoming += 1

    def all(self, plans: Sequence[Plan]) -> list[Evaluated]:
        """Evaluates all; what came of them in the plans' order."""
        return list(self.in_order(plans))


@dataclass(frozen=True)
class ByTable(Evaluate):
    """Wraps an evaluation: its score, and the latency that a table predicts, whichever table that is by now."""

    evaluate: Evaluate
    table: LatencyTable

    def __call__(self, plan: Plan) -> Evaluated:
        return self._predicted(plan, self.evaluate(plan))

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Evaluated]]:
        for index, measured in self.evaluate.as_done(plans):
            yield index, self._predicted(plans[index], measured)

    def _predicted(self, plan: Plan, measured: Evaluated) -> Evaluated:
        measured = checked(measured)
        if isinstance(measured, Failure):
            return measured
        return replace(measured, latency_ms=self.table.predict_ms(plan), speedup=self.table.predict_speedup(plan))


class CachedEvaluate(Evaluate):
    """Wraps an evaluation so that equal plans are evaluated once, in a resumed run too.

    Args:
        evaluate: the evaluation.
        path: a file of JSON lines that remembers across processes; None remembers in memory alone.

    Attributes:
        error: the first that made a plan's evaluation fail, where that was in this process.
    """

    error: BaseException | None = None

    def __init__(self, evaluate: Evaluate, path: Path | None = None) -> None:
        self._evaluate, self._path = evaluate, path
        lines = read_lines(path, "the record of evaluated plans") if path is not None else []
        try:
            self._known = {str(line["key"]): evaluated(line) for line in lines}
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the record of evaluated plans is corrupt: {path} ({error}). Delete it.") from None

    @property
    def count(self) -> int:
        """How many plans were evaluated."""
        return len(self._known)

    def knows(self, plan: Plan) -> bool:
        """Whether a plan was evaluated before."""
        return plan.key in self._known

    def __call__(self, plan: Plan) -> Evaluated:
        key = plan.key
        if key not in self._known:
            self._remember(key, checked(self._evaluate(plan)))
        return self._known[key]

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Evaluated]]:
        """Evaluates those that are unknown, equal ones once; each is on disk before it is yielded."""
        waiting: dict[str, list[int]] = {}
        for index, plan in enumerate(plans):
            waiting.setdefault(plan.key, []).append(index)
        unknown = [plans[indices[0]] for key, indices in waiting.items() if key not in self._known]
        for key, indices in waiting.items():
            if key in self._known:
                yield from ((index, self._known[key]) for index in indices)
        for position, measured in self._evaluate.as_done(unknown):
            key, measured = unknown[position].key, checked(measured)
            self._remember(key, measured)
            yield from ((index, measured) for index in waiting[key])

    def _remember(self, key: str, measured: Evaluated) -> None:
        if isinstance(measured, Failure):  # its frames hold a model
            self.error, measured = self.error or measured.error, Failure(measured.reason)
        self._known[key] = measured
        if self._path is not None:
            append_line(self._path, {"key": key, **measured.to_json()})
