"""What users give and a run calls again and again: batches, a loss, an evaluation. Each failure is one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor

from autoprune.errors import AutopruneError, GivenError, NumericalError, first_line

_END = object()


def kind(value: Any) -> str:
    """A value's type, in a sentence."""
    return f"a {type(value).__name__}"


def described(error: BaseException) -> str:
    """An error in one line, without a full stop."""
    if isinstance(error, AutopruneError):
        return str(error).rstrip(".")
    line = first_line(error)
    return f"{type(error).__name__}: {line.rstrip('.')}" if line else type(error).__name__


@contextmanager
def called(failed: str) -> Iterator[None]:
    """Turns what a user's code raises, which may be anything, into a GivenError that begins with `failed`.

    Numbers that nothing can be done with stay a NumericalError; there being no memory is no fault of that code.
    """
    try:
        yield
    except (MemoryError, GivenError, NumericalError):
        raise
    except Exception as error:
        raise GivenError(f"{failed}: {described(error)}.") from error


def read(batches: Iterable[Any], what: str) -> Iterator[tuple[int, Any, Any]]:
    """Each batch: its number, counted from 1, its inputs and its target.

    Args:
        batches: iterated once.
        what: they are called in an error, e.g. ``the training data``.

    Raises:
        GivenError: one cannot be read, or is no pair.
    """
    with called(f"{what} cannot be read"):
        each = iter(batches)
    for number in count(1):
        with called(f"batch {number} of {what} cannot be read"):
            batch = next(each, _END)
        if batch is _END:
            return
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
            raise GivenError(
                f"batch {number} of {what} must be an (inputs, target) pair, not {kind(batch)}{size}: several inputs "
                "go into a tuple, ((x1, x2), target), and what is neither must be left out."
            )
        yield number, batch[0], batch[1]


def check_loss(value: Any, *, differentiated: bool = True) -> None:
    """Raises GivenError where a loss is not one number, with a gradient if it is to be `differentiated`."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        given = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else kind(value)
        raise GivenError(f"the loss must be one number, a tensor such as a mean over the batch; it gave {given}.")
    if differentiated and not value.requires_grad:
        raise GivenError("the loss has no gradient: compute it from the model's output, in torch, without detach().")
