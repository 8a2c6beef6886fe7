"""Fusion: which batch norm follows which convolution, which ReLU follows that, and folding the norm away.

Pairs are found by identity: a norm follows a convolution when the tensor it is given is the very one the convolution
returned, and no other torch function reads that tensor. A module that runs more than once takes no part. A tensor that
the model returns as well is not seen here; `repack` finds it out when it compares the outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.model.arguments import call_with
from autoprune.model.inventory import watch_forward
from autoprune.repack.weights.batch_norm import affine, folded


@dataclass(frozen=True)
class Fusion:
    """Names of the modules that follow a layer directly; None where there are none."""

    batch_norm: str | None = None
    relu: str | None = None


class _Uses(TorchFunctionMode):
    """Counts the torch functions that make tensors out of each tensor; one inside another does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
            self.count.update(map(id, _tensors([*args, *(kwargs or {}).values()])))
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def find_fusions(model: nn.Module, inputs: Any) -> dict[str, Fusion]:
    """Runs `model` once and returns layer name -> what follows it and can be fused."""
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU)
    modules: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    produced: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive, so that ids stay theirs
    follows: dict[str, str] = {}
    calls: Counter[str] = Counter()
    uses = _Uses()
    shared: dict[str, int] = {}  # tensors written in place: how often they were read until then

    def seen(name: str, args: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        source, _ = produced.get(id(args[0]), ("", None)) if args else ("", None)
        if source:
            follows[source] = name
        if source and output is args[0]:
            shared[source] = uses.count[id(output)]
        if isinstance(output, Tensor):
            produced[id(output)] = (name, output)

    with watch_forward(model, modules, seen), uses:
        call_with(model, inputs)
    readers = {name: uses.count[key] for key, (name, _) in produced.items()} | shared

    def next_of(name: str, kind: type[nn.Module]) -> str | None:
        after = follows.get(name)
        fine = after is not None and isinstance(modules[after], kind) and calls[after] == calls[name] == 1
        fine = fine and readers[name] == 1
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
        scale, shift = affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        weight, bias = folded(conv.weight, conv.bias, scale, shift)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias, requires_grad=False)
