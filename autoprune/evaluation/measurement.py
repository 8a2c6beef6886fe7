"""What an evaluated plan is known by, and the cache that never evaluates one twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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


Evaluate = Callable[[Plan], Measurement]


@dataclass(frozen=True)
class ByTable:
    """Wraps an evaluation: its score, and the latency that a table predicts, whichever table that is by now."""

    evaluate: Evaluate
    table: LatencyTable

    def __call__(self, plan: Plan) -> Measurement:
        score = self.evaluate(plan).score
        return Measurement(score, self.table.predict_ms(plan), self.table.predict_speedup(plan))


class CachedEvaluate:
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
            self._known[key] = self._evaluate(plan)
            if self._path is not None:
                append_line(self._path, {"key": key, **self._known[key].to_json()})
        return self._known[key]
