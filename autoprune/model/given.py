"""What users give and a run calls again and again: batches, a loss, an evaluation. Each failure is one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor

from autoprune.errors import AutopruneError, GivenError, NumericalError, first_line
from autoprune.model.arguments import Arguments

TARGETS = ("labels", "label", "targets", "target")
"""What the target of a batch that is a mapping may be called; the first of them that it has."""

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
    """Each batch: its number, counted from 1, its inputs and its target, None where it has none.

    Args:
        batches: iterated once; see `inputs_and_target`.
        what: they are called in an error, e.g. ``the training data``.

    Raises:
        GivenError: one cannot be read, or is no batch.
    """
    with called(f"{what} cannot be read"):
        each = iter(batches)
    for number in count(1):
        with called(f"batch {number} of {what} cannot be read"):
            batch = next(each, _END)
        if batch is _END:
            return
        parts = inputs_and_target(batch)
        if parts is None:
            size = " of 0" if isinstance(batch, (tuple, list, Mapping)) else ""
            raise GivenError(
                f"batch {number} of {what} must be an (inputs, target) pair, not {kind(batch)}{size}; or "
                f"(input, input, ..., target), a dictionary of inputs with the target at {' or '.join(TARGETS)}, or "
                "inputs alone."
            )
        yield number, *parts


def read_calibration(batches: Iterable[Any]) -> Iterator[tuple[int, Any, Any]]:
    """`read` of calibration batches; each must have samples, as what is averaged over a batch is nothing without.

    Raises:
        GivenError: one cannot be read, is no batch, or is empty.
    """
    for number, inputs, target in read(batches, "the calibration data"):
        first = next(iter(Arguments.of(inputs).tensors), None)
        if first is not None and first.dim() and not len(first):
            raise GivenError(
                f"batch {number} of the calibration data has no samples: its first tensor has the shape "
                f"{tuple(first.shape)}. Leave it out."
            )
        yield number, inputs, target


def inputs_and_target(batch: Any) -> tuple[Any, Any] | None:
    """The inputs of a batch, in a form that `Arguments` takes, and its target; None for what is no batch.

    ``(inputs, target)``; of a longer tuple or list, its last entry is the target; of a mapping, what it has at one of
    `TARGETS`, and the rest is named inputs. A tensor, a tuple of one and a mapping without a target are inputs alone,
    and the target is None.
    """
    if isinstance(batch, (Tensor, Arguments)):
        return batch, None
    if isinstance(batch, Mapping) and batch:
        name = next((name for name in TARGETS if name in batch), None)
        return {key: value for key, value in batch.items() if key != name}, None if name is None else batch[name]
    if not isinstance(batch, (tuple, list)) or not batch:
        return None
    *inputs, target = batch
    if not inputs:
        return target, None
    return inputs[0] if len(inputs) == 1 else tuple(inputs), target


def check_loss(value: Any, *, differentiated: bool = True) -> None:
    """Raises GivenError where a loss is not one number, with a gradient if it is to be `differentiated`."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        given = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else kind(value)
        raise GivenError(f"the loss must be one number, a tensor such as a mean over the batch; it gave {given}.")
    if differentiated and not value.requires_grad:
        raise GivenError("the loss has no gradient: compute it from the model's output, in torch, without detach().")
