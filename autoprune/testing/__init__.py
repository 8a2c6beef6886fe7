"""For tests: the laws of each kind of member, to check one of your own against, and stand-ins for slow and noisy parts.

A ``check_*`` runs all laws of its kind and raises BrokenLaw, an AssertionError, at the first that does not hold. None
needs pytest, data or a network.
"""

from autoprune.testing.agents import check_agent
from autoprune.testing.allocations import check_allocation
from autoprune.testing.backends import check_backend
from autoprune.testing.criteria import check_criterion
from autoprune.testing.law import BrokenLaw
from autoprune.testing.methods import check_method
from autoprune.testing.patterns import check_pattern
from autoprune.testing.recoveries import check_recovery
from autoprune.testing.stand_ins import (
    ANCHORS,
    EvaluateBy,
    FakeClock,
    FakeEvaluate,
    fake_problem,
    fake_table,
    save_fake_table,
    small_cnn,
)

__all__ = [
    "ANCHORS",
    "BrokenLaw",
    "EvaluateBy",
    "FakeClock",
    "FakeEvaluate",
    "check_agent",
    "check_allocation",
    "check_backend",
    "check_criterion",
    "check_method",
    "check_pattern",
    "check_recovery",
    "fake_problem",
    "fake_table",
    "save_fake_table",
    "small_cnn",
]
