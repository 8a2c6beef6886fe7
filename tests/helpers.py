"""What tests of several folders ask of a result before they read it."""

from __future__ import annotations

from autoprune.evaluation.measurement import Evaluated, Measurement


def measured(outcome: Evaluated) -> Measurement:
    """The measurement that an evaluation came to; a failure fails the test."""
    assert isinstance(outcome, Measurement), outcome
    return outcome
