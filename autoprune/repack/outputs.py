"""Comparing what two forms of a model return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the output's largest value


def same_output(got: Any, wanted: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two outputs (tensors, or any nesting of them) are equal up to `tolerance` of their largest value."""
    if isinstance(wanted, Tensor):
        return isinstance(got, Tensor) and _same_tensor(got, wanted, tolerance)
    if got is wanted:
        return True
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, Mapping):
        return set(got) == set(wanted) and all(same_output(got[key], wanted[key], tolerance) for key in wanted)
    if isinstance(wanted, (tuple, list)):
        return len(got) == len(wanted) and all(same_output(a, b, tolerance) for a, b in zip(got, wanted, strict=True))
    inside = getattr(wanted, "__dict__", None)  # a dataclass, a distribution
    return same_output(vars(got), inside, tolerance) if inside else bool(got == wanted)


def _same_tensor(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if got.layout != wanted.layout or got.is_nested != wanted.is_nested:
        return False
    if wanted.is_nested:
        return same_output(list(got.unbind()), list(wanted.unbind()), tolerance)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if wanted.layout is not torch.strided:
        return _same_tensor(got.to_dense(), wanted.to_dense(), tolerance)
    if wanted.is_complex():
        return _same_tensor(torch.view_as_real(got), torch.view_as_real(wanted), tolerance)
    if not wanted.is_floating_point() or wanted.numel() == 0:
        return bool(torch.equal(got, wanted))
    largest = torch.where(wanted.isfinite(), wanted, 0).abs().amax()
    close = (got - wanted).abs() <= tolerance * largest
    return bool((close | (got == wanted) | (got.isnan() & wanted.isnan())).all())


def noise_of(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error of an output, as a share of its size (both root mean squares); infinite for other shapes.

    Outputs of integers do not count: one may follow from a comparison that the error turns. Nor do elements that are
    equal, though infinite, as masked ones are, or NaN where the right one is.
    """
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return math.inf
    shares = [0.0]
    for ours, right in zip(got, wanted, strict=True):
        if right.is_floating_point() and right.numel():
            alike = (ours == right) | right.isnan()
            size = float(torch.where(right.isfinite(), right, 0.0).double().square().mean().sqrt())
            error = float(torch.where(alike, 0.0, ours.double() - right.double()).square().mean().sqrt())
            shares.append(error / size if size else math.inf if error else 0.0)
    return math.inf if any(map(math.isnan, shares)) else max(shares)


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = TOLERANCE) -> str:
    """How outputs differ from the model's, in words; empty where `same_output` finds them the same."""
    if len(got) != len(wanted):
        return f"{len(got)} outputs for the model's {len(wanted)}"
    for at, (ours, right) in enumerate(zip(got, wanted, strict=True)):
        if not same_output(ours, right, tolerance):
            which = "its output" if len(wanted) == 1 else f"its output {at + 1} of {len(wanted)}"
            return f"{which} {_tensor_difference(ours, right, tolerance)}"
    return ""


def _tensor_difference(got: Tensor, wanted: Tensor, tolerance: float) -> str:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        ours, right = (f"{str(x.dtype).removeprefix('torch.')} of {tuple(x.shape)}" for x in (got, wanted))
        return f"is {ours}, the model's {right}"
    if wanted.is_complex():
        return _tensor_difference(torch.view_as_real(got), torch.view_as_real(wanted), tolerance)
    values = f"of {wanted.numel()} values"
    if not wanted.is_floating_point():
        return f"differs in {int((got != wanted).sum())} {values}"
    lost = ~(got.isfinite() & wanted.isfinite() | (got == wanted) | (got.isnan() & wanted.isnan()))
    if lost.any():
        return f"differs in {int(lost.sum())} {values}, where one of both is infinite or no number"
    gap = torch.where(wanted.isfinite(), (got - wanted).abs(), 0)
    largest = torch.where(wanted.isfinite(), wanted, 0).abs().amax()
    count = int((gap > tolerance * largest).sum())
    return f"differs in {count} {values}, by up to {float(gap.amax()):.2g} where the model's largest is {largest:.2g}"
