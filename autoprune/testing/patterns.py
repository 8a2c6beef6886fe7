"""Laws of every pattern: masks pass their own check, have the promised sparsity, and are the same every time."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from autoprune.patterns.base import Pattern
from autoprune.testing.cases import draw_weight
from autoprune.testing.law import require


def check_pattern(pattern: Pattern, *, examples: int = 50, seed: int = 0) -> None:
    """Checks a pattern on random weights of convolutions, grouped ones too, and of Linears.

    Args:
        pattern: what is checked.
        examples: how many weights; at each the laws of `check_masks` are checked.
        seed: of the weights.

    Raises:
        BrokenLaw: the pattern breaks a law; the message says which.
    """
    draws = random.Random(seed)
    for _ in range(examples):
        saliency, groups = draw_weight(draws)
        sparsity, later = sorted(draws.uniform(0.0, 0.99) for _ in range(2))
        check_masks(pattern, saliency, sparsity, groups, later=later)
    check_refusal(pattern)


def check_masks(
    pattern: Pattern, saliency: Tensor, sparsity: float, conv_groups: int = 1, *, later: float = 0.99
) -> None:
    """Checks a pattern on one weight.

    Args:
        pattern: what is checked.
        saliency: scores >= 0, in the weight's shape.
        sparsity: to mask to, in [0, 1).
        conv_groups: groups of a grouped convolution.
        later: sparsity of a second mask within the first, of other scores; from `sparsity` up to 1.

    Raises:
        BrokenLaw: the pattern breaks a law.
    """
    case = f"for a weight of shape {tuple(saliency.shape)}, {conv_groups} groups and sparsity {sparsity}"
    shape, before = tuple(saliency.shape), saliency.clone()
    cells = pattern.cells(shape, conv_groups)
    require(tuple(cells.shape) == shape and cells.dtype == torch.int64, pattern, f"numbers cells as int64, {case}")
    sizes = torch.bincount(cells.flatten())
    require(bool((sizes > 0).all()), pattern, f"numbers its cells from 0 without a gap, {case}")

    mask = pattern.mask(saliency, sparsity, conv_groups)
    require(mask.shape == saliency.shape and mask.dtype == torch.bool, pattern, f"returns a bool mask, {case}")
    require(bool(mask.any()), pattern, f"keeps at least one cell, {case}")
    require(pattern.check(mask, conv_groups), pattern, f"passes its own masks in `check`, {case}")
    require(torch.equal(saliency, before), pattern, f"leaves the saliency as it was, {case}")
    off = abs(1.0 - mask.float().mean().item() - pattern.feasible(shape, sparsity, conv_groups))
    require(off <= 2 * int(sizes.max()) / mask.numel(), pattern, f"has the sparsity that `feasible` says, {case}")

    wanted = [sparsity, later, 0.0]
    alone = [mask, *(pattern.mask(saliency, value, conv_groups) for value in wanted[1:])]
    together = pattern.masks(saliency, wanted, conv_groups)
    require(
        len(together) == len(alone) and all(map(torch.equal, together, alone)),
        pattern,
        f"makes the same mask every time, alone and as one of several, {case}",
    )

    within = pattern.mask(saliency.flip(0), later, conv_groups, within=mask)
    require(not bool((within & ~mask).any()), pattern, f"cuts what the mask before cut, {case}, {later} within it")
    require(bool(within.any()), pattern, f"keeps at least one cell, {case}, {later} within it")
    require(pattern.check(within, conv_groups), pattern, f"passes its own masks in `check`, {case}, {later} within it")


def check_refusal(pattern: Pattern) -> None:
    """Checks that `check` refuses a mask that keeps parts of cells, where cells hold more than one weight.

    Raises:
        BrokenLaw: it does not.
    """
    mask = torch.ones(16, 16, 3, 3, dtype=torch.bool)
    mask[0, :, 0, 0] = torch.arange(16) % 4 != 1
    mask[9, :, 0, 0] = torch.arange(16) % 4 != 2
    if bool((torch.bincount(pattern.cells(tuple(mask.shape)).flatten()) > 1).any()):
        require(not pattern.check(mask), pattern, "refuses masks that keep a part of a cell")
