"""Whole layers: residual branches that are cut as one, and that the repacked program then does not run at all.

A pattern keeps a cell of every layer, so that a network stays connected; a layer can go as a whole only where something
goes around it. That is found in the model's graph, which is why this is no pattern.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, did_you_mean
from autoprune.masks import Batches, Loss, apply_masks_
from autoprune.model.arguments import call_with
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.editor import Editor
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.graph.passes import bypass_branch, simplify


@dataclass(frozen=True)
class Branch:
    """A residual branch: ``f`` of ``x + f(x)``, or of a sum with another branch.

    Attributes:
        layers: names of the Conv2d and Linear layers that serve nothing else, in the order they run; the last one's
            output is what is added.
    """

    layers: tuple[str, ...]


def find_branches(model: nn.Module, inputs: Any) -> tuple[Branch, ...]:
    """The residual branches of a model, in the order they end; one may lie within another.

    Args:
        model: left as it is.
        inputs: a tensor or a tuple of them, as the model is called.

    Raises:
        CaptureError: the model cannot be captured as a program.
    """
    graph = simplify(capture(model, inputs))
    found = []
    for op in graph.ops:
        shorter = Editor(graph)
        if not isinstance(op, LayerOp) or op.layer is None or not bypass_branch(shorter, shorter.ops[op.output]):
            continue
        left = _layers(shorter.graph())
        found.append(Branch(tuple(name for name in _layers(graph) if name not in left)))
    return tuple(found)


def rank_branches(model: nn.Module, inputs: Any, batches: Batches, loss: Loss) -> list[tuple[Branch, float]]:
    """The model's branches and its mean loss without each, the most dispensable first; the model is left as it is.

    Args:
        model: in training or eval mode; its loss is that of eval mode.
        inputs: a tensor or a tuple of them, as the model is called.
        batches: to take the loss on.
        loss: the task's.

    Raises:
        CaptureError: the model cannot be captured as a program.
    """
    ranked = []
    for branch in find_branches(model, inputs):
        without = copy.deepcopy(model)
        _silence_(without, inputs, branch.layers)
        ranked.append((branch, _mean_loss(without.eval(), batches, loss)))
    return sorted(ranked, key=lambda row: row[1])


def cut_branches_(model: nn.Module, inputs: Any, layers: Iterable[str]) -> tuple[str, ...]:
    """Cuts, in place, the innermost residual branch around each of `layers`; returns the names of all layers cut.

    Their weights, biases and norms are zero and no longer trained (``requires_grad`` is off), so that they stay so in
    any training that follows; leave them out of its plan. `repack` then runs the model without them.

    Args:
        model: trained or not.
        inputs: a tensor or a tuple of them, as the model is called.
        layers: names of Conv2d and Linear layers.

    Raises:
        AutopruneError: a layer lies in no residual branch, or its branch would leave a constant; nothing is cut then.
        CaptureError: the model cannot be captured as a program.
    """
    branches, wanted = find_branches(model, inputs), list(layers)
    inside = sorted({name for branch in branches for name in branch.layers})
    cut: set[str] = set()
    for name in wanted:
        around = [branch.layers for branch in branches if name in branch.layers]
        if not around:
            hint = did_you_mean(name, inside) if inside else "The model has none."
            raise AutopruneError(f"layer {name!r} cannot be cut as a whole: it lies in no residual branch. {hint}")
        innermost = min(around, key=len)
        cut.update(innermost)
    trial = copy.deepcopy(model)
    _silence_(trial, inputs, cut)
    if stuck := sorted(cut & set(_layers(simplify(capture(trial, inputs))))):
        raise AutopruneError(
            f"the branch of {', '.join(stuck)} cannot be cut: what follows its last layer would still give a "
            "constant. An affine batch norm, right behind the layer, can be silenced; other norms cannot."
        )
    _silence_(model, inputs, cut)
    return tuple(dict.fromkeys(name for branch in branches for name in branch.layers if name in cut))


def _silence_(model: nn.Module, inputs: Any, layers: Iterable[str]) -> None:
    inventory = take_inventory(model, inputs, min_weights=1)
    masks = {name: torch.zeros_like(weight_of(model, name), dtype=torch.bool) for name in layers}
    apply_masks_(model, masks, inventory)
    for name in masks:
        norm = inventory[name].norm
        for part in (name, norm):
            if part is not None:
                model.get_submodule(part).requires_grad_(False)


def _mean_loss(model: nn.Module, batches: Batches, loss: Loss) -> float:
    with torch.no_grad():
        losses: list[Tensor] = [loss(call_with(model, inputs), target) for inputs, target in batches]
    if not losses:
        raise AutopruneError("branches cannot be ranked on no batches; give at least one.")
    return float(torch.stack(losses).mean())


def _layers(graph: Graph) -> list[str]:
    return list(dict.fromkeys(op.layer for op in graph.ops if isinstance(op, LayerOp) and op.layer))
