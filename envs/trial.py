"""A trial: one plan, what its evaluation gave, and the reward for that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autoprune.errors import NumericalError
from autoprune.evaluation.measurement import Evaluated, Failure, Measurement, evaluated
from autoprune.plan import Plan

_FIDELITY = "fidelity"  # its key in JSON; absent where it is 0


@dataclass(frozen=True)
class Reward:
    """The terms of a terminal reward; their sum is what the agent gets."""

    score: float
    speed: float

    @property
    def total(self) -> float:
        return self.score + self.speed


@dataclass(frozen=True)
class Trial:
    """What a finished episode comes to; a line of ``trials.jsonl``.

    Attributes:
        plan: what was decided.
        evaluated: its measurement, or why there is none.
        reward: the sum of the terms, unless the plan was rewarded for another target since.
        terms: of the reward for the search's target.
        fidelity: optimizer steps of training before the plan was scored, beyond the search's own recovery; 0: none.
            Rewards are comparable at one fidelity only.
    """

    plan: Plan
    evaluated: Evaluated
    reward: float
    terms: Reward
    fidelity: int = 0

    @property
    def failed(self) -> bool:
        """Whether the plan has no measurement."""
        return isinstance(self.evaluated, Failure)

    @property
    def measurement(self) -> Measurement:
        """The plan's measurement.

        Raises:
            NumericalError: the trial failed; the message says why.
        """
        if isinstance(self.evaluated, Failure):
            raise NumericalError(f"the trial failed and has no measurement: {self.evaluated.reason}")
        return self.evaluated

    @property
    def rank(self) -> tuple[float, float]:
        """What one trial is chosen over another by: its reward, of equal rewards the better score."""
        return self.reward, -math.inf if isinstance(self.evaluated, Failure) else self.evaluated.score

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_json(),
            **self.evaluated.to_json(),
            "reward": self.reward,
            "terms": asdict(self.terms),
            **({_FIDELITY: self.fidelity} if self.fidelity else {}),
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Trial:
        """Reads what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: something is missing, or no number.
            ConfigError: the plan is none.
        """
        terms = line["terms"]
        return cls(
            Plan.from_json(line["plan"]),
            evaluated(line),
            float(line["reward"]),
            Reward(float(terms["score"]), float(terms["speed"])),
            int(line.get(_FIDELITY, 0)),
        )
