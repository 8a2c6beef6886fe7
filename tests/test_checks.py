"""Checks of arguments: what they let through, and what their errors say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from autoprune.checks import check_counts, check_flags, check_numbers
from autoprune.errors import ConfigError


def test_what_is_allowed_passes() -> None:
    check_flags("a thing", {"on": True, "off": False})
    check_counts("a thing", {"one": 1, "many": 10**400})
    check_counts("a thing", {"none": 0, "few": 3}, least=0, most=3)
    check_numbers("a thing", {"low": 0, "high": 1.0}, 0.0, 1.0)
    check_numbers("a thing", {"inside": 0.5}, 0.0, 1.0, "()")
    check_numbers("a thing", {"low": 0.0}, 0.0, 1.0, "[)")
    check_numbers("a thing", {"high": 1}, 0.0, 1.0, "(]")
    check_numbers("a thing", {"tiny": 5e-324}, 0.0, ends="(]")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: check_flags("a thing", {"on": True, "off": 0}), "a thing: off must be true or false, not 0."),
        (lambda: check_counts("a thing", {"n": 0}), "a thing: n must be an integer >= 1, not 0."),
        (lambda: check_counts("a thing", {"n": True}), "n must be an integer >= 1, not True."),
        (lambda: check_counts("a thing", {"n": 2.0}), "n must be an integer >= 1, not 2.0."),
        (lambda: check_counts("a thing", {"n": -1}, least=0), "n must be an integer >= 0, not -1."),
        (lambda: check_counts("a thing", {"n": 9}, most=8), "n must be an integer from 1 to 8, not 9."),
        (lambda: check_numbers("a thing", {"x": 2}, 0.0, 1.0), "a thing: x must be a number in [0, 1], not 2."),
        (lambda: check_numbers("a thing", {"x": "1"}, 0.0, 1.0), "x must be a number in [0, 1], not '1'."),
        (lambda: check_numbers("a thing", {"x": True}, 0.0, 1.0), "x must be a number in [0, 1], not True."),
        (lambda: check_numbers("a thing", {"x": math.nan}, 0.0), "x must be a number >= 0, not nan."),
        (lambda: check_numbers("a thing", {"x": math.inf}, 0.0), "x must be a number >= 0, not inf."),
        (lambda: check_numbers("a thing", {"x": 0}, 0.0, ends="(]"), "x must be a number > 0, not 0."),
        (lambda: check_numbers("a thing", {"x": 0}, 0.0, 1.0, "(]"), "x must be a number in (0, 1], not 0."),
        (lambda: check_numbers("a thing", {"x": 1}, 0.0, 1.0, "[)"), "x must be a number in [0, 1), not 1."),
        (
            lambda: check_numbers("a thing", {"x": [0] * 99}, 0.0),
            "x must be a number >= 0, not [0, 0, 0, 0, 0, 0, ...].",
        ),
    ],
)
def test_what_is_not_allowed_is_said(check: Callable[[], None], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        check()
