"""How a check says which law a member does not keep."""

from __future__ import annotations

from autoprune.errors import AutopruneError


class BrokenLaw(AutopruneError, AssertionError):
    """A member does not keep a law of its kind; the message names the member, the law and the case."""


def require(kept: bool, member: object, law: str) -> None:
    """Raises BrokenLaw unless `kept`.

    Args:
        kept: whether the law holds.
        member: what is checked; an object or a class.
        law: what must be so, as a sentence about the member ("returns a bool mask").
    """
    if not kept:
        name = member.__name__ if isinstance(member, type) else type(member).__name__
        raise BrokenLaw(f"{name} breaks a law: it {law}.")
