"""Running statistics of batch norms, found anew: those of a pruned model are not the dense one's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.errors import AutopruneError
from autoprune.masks import Batches
from autoprune.model.arguments import call_with
from autoprune.model.given import called, read_calibration
from autoprune.model.inventory import eval_mode


def recalibrate_batch_norm_(model: nn.Module, batches: Batches) -> nn.Module:
    """Recomputes every running mean and variance as the plain average over `batches`; weights stay as they are.

    The statistics of a pruned model are not the dense one's (Li et al. 2020, EagleEye). A model without batch norm is
    not even run. Modes and momenta are left as they were.

    Raises:
        AutopruneError: `batches` is empty.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        with eval_mode(model), torch.no_grad():  # dropout must not disturb what the norms see
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for seen, inputs, _ in read_calibration(batches):
                with called(f"the model does not run on batch {seen} of the calibration data"):
                    call_with(model, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if seen == 0:
        raise AutopruneError("batch norm cannot be recalibrated on no batches; give at least one.")
    return model
