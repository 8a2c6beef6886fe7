"""Laws of every recovery: the plan holds, what is cut stays cut, and nothing but the copy given is changed."""

from __future__ import annotations

import pytest

from autoprune.evaluation.recovery import RECOVERIES
from autoprune.registry import Choice
from autoprune.testing import check_recovery


@pytest.mark.parametrize("name", list(RECOVERIES))
def test_every_recovery_keeps_the_laws(name: str) -> None:
    check_recovery(RECOVERIES.create(Choice(name)))
