"""What several files of tests share."""

from __future__ import annotations

from autoprune.evaluation.measurement import Evaluated, Measurement

SMALL_TOML = """
[task]
name = "digits"
widths = [8, 16]
[dense]
epochs = 1
learning_rate = 0.1
[latency]
samples = 3
search_samples = 3
profile_samples = 3
engines = ["eager"]
[finetune.settings]
epochs = 1
"""
"""A config of the digits task without a target and an environment, quick to run through."""


def measured(outcome: Evaluated) -> Measurement:
    """The measurement that an evaluation came to; a failure fails the test."""
    assert isinstance(outcome, Measurement), outcome
    return outcome
