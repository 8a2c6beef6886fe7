"""Fusion: which batch norm follows which convolution, which ReLU follows that, and folding the norm away.

Pairs are found by identity: a norm follows a convolution when the tensor it is given is the very one the convolution
returned. A module that runs more than once takes no part. That the output in between is used nowhere else is not
seen here; `repack` finds it out when it compares the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.inventory import watch_forward


@dataclass(frozen=True)
class Fusion:
    """Names of the modules that follow a layer directly; None where there are none."""

    batch_norm: str | None = None
    relu: str | None = None


def find_fusions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Fusion]:
    """Runs `model` once and returns layer name -> what follows it and can be fused."""
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU)
    modules: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    produced: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive, so that ids stay theirs
    follows: dict[str, str] = {}
    calls: dict[str, int] = {}

    def seen(name: str, args: tuple[Any, ...], output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if args and id(args[0]) in produced:
            follows[produced[id(args[0])][0]] = name
        if isinstance(output, Tensor) and output is not args[0]:
            produced[id(output)] = (name, output)

    with watch_forward(modules, seen):
        model(*inputs)

    def next_of(name: str, kind: type[nn.Module]) -> str | None:
        after = follows.get(name)
        fine = after is not None and isinstance(modules[after], kind) and calls[after] == calls[name] == 1
        return after if fine else None

    fusions = {}
    for name, module in modules.items():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or name not in calls:
            continue
        norm = next_of(name, nn.BatchNorm2d) if isinstance(module, nn.Conv2d) else None
        if norm is not None and modules[norm].running_mean is None:
            norm = None
        fusions[name] = Fusion(norm, next_of(norm or name, nn.ReLU))
    return fusions


def fold_batch_norm_(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Scales the convolution and moves its bias, in place, so that it does what both did in eval mode."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -norm.running_mean.double() * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        if conv.bias is not None:
            bias = bias + conv.bias.double() * scale
        conv.weight.copy_((conv.weight.double() * scale[:, None, None, None]).float())
        conv.bias = nn.Parameter(bias.float(), requires_grad=False)
