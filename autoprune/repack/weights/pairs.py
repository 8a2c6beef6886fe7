"""Weights in bfloat16, and two of them a 32-bit lane as the kernels read them.

Any two kept positions of a list make a pair, since a kernel reads both by their own offsets. The last of an odd number
is read twice, with half its weight each: that is exact, and nothing is multiplied by a zero that the weight has not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.repack.weights.alignment import on_cache_lines

Ints = NDArray[np.int32]
Places = NDArray[np.int64]
Halves = NDArray[np.uint16]

LEAST = 2.0**-125  # smaller weights become 0: their halves are not normal numbers, which the instruction takes for 0


def to_bf16(weight: Tensor) -> Tensor:
    """A weight's nearest bfloat16 numbers, of two the even one; zero below `LEAST`."""
    made = weight.detach().to(torch.bfloat16)
    return made.masked_fill(made.abs() < LEAST, 0.0)


def bits_of(values: Tensor) -> Halves:
    """The bits of bfloat16 numbers."""
    bits: Halves = values.contiguous().view(torch.uint16).numpy()
    return bits


def from_bits(bits: Halves) -> Tensor:
    """The bfloat16 numbers of such bits."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)


@dataclass(frozen=True)
class Paired:
    """How lists of kept positions become lists of pairs.

    Attributes:
        places: ``(pairs, 2)``; which kept positions each has.
        alone: ``(pairs,)``; whether it has one position, twice.
        counts: pairs of each list, in the shape of the lists' counts.
    """

    places: Places
    alone: NDArray[np.bool_]
    counts: Places

    def values(self, kept: Halves) -> Ints:
        """The pairs of weights, ``(pairs, group_size)``, from those of the kept positions, ``(kept, group_size)``."""
        made = kept[self.places]  # (pairs, 2, group_size)
        half = from_bits(made[self.alone]) / 2
        made[self.alone] = bits_of(half)
        return on_cache_lines(np.ascontiguousarray(made.transpose(0, 2, 1))).view(np.int32)[..., 0]


def paired(counts: Places) -> Paired:
    """Pairs within each of some lists of kept positions, which follow each other; `counts`: how many each has."""
    each = counts.ravel()
    pairs = -(-each // 2)
    first = np.repeat(np.cumsum(each) - each, pairs)
    rank = np.arange(len(first)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    alone = 2 * rank + 1 == np.repeat(each, pairs)
    one = first + 2 * rank
    return Paired(np.stack([one, np.where(alone, one, one + 1)], axis=1), alone, pairs.reshape(counts.shape))
