"""Batch norms whose shapes torch finds out in one step instead of twenty, while a model is exported.

Where extents are free, torch finds the shape of a batch norm's result by computing it: on tensors without values,
operator by operator, each of which asks anew how every extent and stride relates to the others. That is a fifth
of the time in which GhostNet is captured. The first of these operators tells it all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def light_norms() -> Iterator[None]:
    """Within, this thread's batch norms without training of tensors without values are `_shaped`; within `tracing`."""
    from torch._decomp import decomposition_table  # here: torch's compiler takes long to load
    from torch._subclasses.fake_tensor import FakeTensor

    norm, thread = torch.ops.aten._native_batch_norm_legit_no_training.default, threading.get_ident()
    own = decomposition_table[norm]

    def light(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        tensors = [x for x in given if isinstance(x, Tensor)]
        plain = not kwargs and len(args) == 7 and args[0].dim() > 1 and args[3] is not None
        shaped = all(type(x) is FakeTensor and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        if threading.get_ident() == thread and plain and shaped:
            return _shaped(args[0], args[3])
        return own(*args, **kwargs)

    decomposition_table[norm] = light
    try:
        yield
    finally:
        decomposition_table[norm] = own


def _shaped(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What has the shapes, types and strides of a norm's results: the channels are asked to be as many as the means."""
    return x - means.reshape(-1, *[1] * (x.dim() - 2)), x.new_zeros(0), x.new_zeros(0)
