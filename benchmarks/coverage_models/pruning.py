"""Random weights that behave like trained ones, and zeros in them, in whatever layers a model has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

SPARSITY = 0.75
SIZES = (8, 4, 2, 1)  # filters in a group: the first that divides


@dataclass(frozen=True)
class Rows:
    """A weight whose first axis is its filters.

    Attributes:
        values: ``(filters, ...)``, a view of the model's own.
        conv_groups: of a grouped convolution.
    """

    values: Tensor
    conv_groups: int = 1


def prunable_weights(model: nn.Module) -> Iterator[Rows]:
    """Every weight that multiplies and adds: of convolutions, Linears, recurrent and attention layers; each once."""
    seen: set[int] = set()
    for module in model.modules():
        for rows in _rows(module):
            if (place := rows.values.data_ptr()) not in seen:
                seen.add(place)
                yield rows


def _rows(module: nn.Module) -> Iterator[Rows]:
    own = {name: x.data for name, x in module.named_parameters(recurse=False)}
    kind, weight = type(module).__name__, own.get("weight")
    if isinstance(module, nn.RNNBase):
        yield from (Rows(x) for name, x in own.items() if name.startswith("weight"))
    elif isinstance(module, nn.MultiheadAttention):
        yield from (Rows(x) for name, x in own.items() if name.endswith("proj_weight"))
    elif kind.endswith("Experts"):  # of transformers: a Linear an expert, all in one parameter
        yield from (Rows(each) for x in own.values() if x.ndim == 3 for each in x)
    elif weight is None:
        return  # none, or one that is computed of other parameters
    elif isinstance(module, _ConvTransposeNd):
        if module.groups == 1:
            yield Rows(weight.transpose(0, 1))
    elif isinstance(module, _ConvNd):
        yield Rows(weight, module.groups)
    elif isinstance(module, nn.Linear) or (kind == "Linear" and weight.ndim == 2):  # of torch_geometric, too
        yield Rows(weight)
    elif kind == "Conv1D" and weight.ndim == 2:  # of transformers' GPT-2: a Linear whose weight is (in, out)
        yield Rows(weight.t())


def prune_(model: nn.Module) -> nn.Module:
    """Cuts SPARSITY of every such weight, the filters of a group at the same places; what is left grows by as much.

    In place, by magnitude; at least one place of a group is kept. Returns the model.
    """
    for rows in prunable_weights(model):
        filters = len(rows.values)
        size = next(size for size in SIZES if filters // rows.conv_groups % size == 0)
        norms = rows.values.reshape(filters // size, size, -1).square().sum(1)  # (groups, places)
        kept = norms.topk(max(1, round((1 - SPARSITY) * norms.shape[1]))).indices
        factors = torch.zeros_like(norms).scatter_(1, kept, (1 - SPARSITY) ** -0.5)
        rows.values.mul_(factors.repeat_interleave(size, 0).reshape(rows.values.shape))
    return model


def randomise_(model: nn.Module) -> nn.Module:
    """Gives norms other statistics than 0 and 1, and parameters that are one constant values of their own.

    In place, from torch's generator. Otherwise a layer scale of 1e-6 would hide what is wrong with a whole model, and
    folding a norm away could not be wrong. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        values = parameter.data
        if values.is_floating_point() and values.numel() > 1 and bool((values == values.flatten()[0]).all()):
            if bool((values == 0).all()):
                values.normal_(0.0, 0.1)
            else:
                values.uniform_(0.5, 1.5)
    return model
