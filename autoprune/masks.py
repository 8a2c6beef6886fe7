"""Masked models: dense weights with zeros. A plan becomes masks, masks are applied, zeros are counted.

A mask is applied by zeroing the weight itself, so code that reads a weight behind its module's back (a fused
operator, weight sharing, an exporter) sees the pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoprune.criteria import CRITERIA, Criterion, LayerStatistics
from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments, call_with
from autoprune.model.columns import input_moments, squared_gradients
from autoprune.model.given import called, check_loss, read_calibration
from autoprune.model.inventory import Inventory
from autoprune.model.recurrent.names import partner_of
from autoprune.model.uses import Use, watch_weights
from autoprune.model.weights import as_held, as_read, weight_of
from autoprune.patterns import PATTERNS
from autoprune.patterns.base import Pattern
from autoprune.patterns.layered import cells_of, mask_of, masks_of
from autoprune.plan import LayerSpec, Plan
from autoprune.quantization import unrounded

Masks = dict[str, Tensor]  # layer name -> bool, True keeps, in the weight's shape
Batches = Iterable[Any]  # (inputs, target), or another form that `inputs_and_target` takes
Loss = Callable[[Any, Any], Tensor]


def collect_statistics(
    model: nn.Module, names: Iterable[str], batches: Batches, loss: Loss, needs: Iterable[str]
) -> dict[str, LayerStatistics]:
    """One calibration pass: what the criteria's `needs` ask for, per layer. The model is left as it was."""
    names, wanted = list(names), frozenset(needs)
    if not wanted:
        return {name: LayerStatistics() for name in names}
    sums: dict[str, _Sums] = {}
    samples = 1

    def seen(name: str, use: Use) -> None:
        sums.setdefault(name, _Sums(weight_of(model, name))).add(use, samples, wanted)

    was_training = model.training
    model.eval()  # batch norm must not drift
    try:
        with unrounded(), watch_weights(model, names, seen):
            for number, inputs, target in read_calibration(batches):
                with called(f"the model cannot be calibrated on batch {number}"):
                    samples = max(1, Arguments.of(inputs).samples)
                    if wanted & _DIFFERENTIATED:
                        for name, gradient in _gradients(model, names, loss, inputs, target).items():
                            sums[name].gradient += gradient.abs()
                    else:
                        with torch.no_grad():
                            call_with(model, inputs)
    finally:
        model.train(was_training)
    if missing := [name for name in names if name not in sums]:
        raise AutopruneError(f"calibration never reached {', '.join(missing)}: give batches that run the whole model.")
    return {name: sums[name].statistics(wanted) for name in names}


_DIFFERENTIATED = frozenset({"gradient", "squared_gradient"})


class _Sums:
    """What is summed of one layer while batches pass."""

    def __init__(self, weight: Tensor) -> None:
        self.samples = self.columns = 0
        self.turned = False
        self.gradient: Tensor = torch.zeros_like(weight)
        self.squared_gradient = self.input_square = self.input_moments = torch.zeros(())

    def add(self, use: Use, samples: int, wanted: frozenset[str]) -> None:
        """Takes in one use of the weight on a batch of so many samples."""
        self.turned = use.turned
        x, output = use.by_sample(use.x.detach(), samples), use.output
        if "input_norm" in wanted:
            axis = x.ndim - 1 if use.kind == "linear" else 1
            total = x.double().square().sum(dim=[d for d in range(x.ndim) if d != axis])  # (in,)
            self.input_square = self.input_square + total
        if "input_moments" in wanted:
            self.input_moments = self.input_moments + input_moments(use, x)
            self.columns += output.numel() // len(use.weight)
        if "squared_gradient" in wanted:
            self.samples += len(x)

            def add_gradient(gradient: Tensor) -> None:
                own = use.by_sample(gradient.reshape(output.shape), samples)
                own = own * len(x)  # of a sample's own loss: the batch's is their mean
                self.squared_gradient = self.squared_gradient + squared_gradients(use, x, own)

            # A hook, not a gradient asked for later: an in-place ReLU would take the output's place. Where the output
            # is a view, as that of a Linear is, such a ReLU would take the hook away too, but not its base's.
            base = output._base if output._is_view() else output
            cast("Tensor", base).register_hook(add_gradient)

    def statistics(self, wanted: frozenset[str]) -> LayerStatistics:
        moments = (self.input_moments / max(1, self.columns)).float()
        found = {
            "gradient": as_read(self.gradient, self.turned),
            "input_norm": self.input_square.sqrt().float(),
            "squared_gradient": self.squared_gradient / max(1, self.samples),
            "input_moments": moments,
        }
        return LayerStatistics(**{name: value for name, value in found.items() if name in wanted})


def _gradients(model: nn.Module, names: list[str], loss: Loss, inputs: Any, target: Tensor) -> dict[str, Tensor]:
    """Of the layers' weights, as far as the loss depends on them."""
    with torch.enable_grad():
        value = loss(call_with(model, inputs), target)
        check_loss(value)
        grads = torch.autograd.grad(value, [weight_of(model, name) for name in names], allow_unused=True)
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def criteria_needs(plan: Plan) -> frozenset[str]:
    """The statistics that the criteria of `plan` read."""
    return frozenset().union(*(CRITERIA.get(layer.criterion.name).needs for layer in plan.layers.values()))


def score_layers(
    model: nn.Module, inventory: Inventory, plan: Plan, statistics: Mapping[str, LayerStatistics]
) -> dict[str, Tensor]:
    """The saliency of every planned layer, by its own criterion; layers at sparsity 0 have none.

    Raises:
        ConfigError: the plan names a layer the model does not have.
    """
    plan.check_layers(inventory.names)
    return {
        name: saliency_of(CRITERIA.create(layer.criterion), inventory[name], weight_of(model, name), statistics[name])
        for name, layer in plan.layers.items()
        if layer.sparsity > 0.0
    }


def saliency_of(criterion: Criterion, layer: LayerSpec, weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """A criterion's scores of a layer, in the shape of its parameter, `weight`."""
    scores = criterion.saliency(as_read(weight, layer.turned), statistics, layer.conv_groups)
    return as_held(scores, layer.turned)


def cut_layers(
    saliency: Mapping[str, Tensor],
    inventory: Inventory,
    plan: Plan,
    sparsities: Mapping[str, float],
    within: Mapping[str, Tensor] | None = None,
    final: Mapping[str, float] | None = None,
) -> Masks:
    """One mask a layer whose sparsity is above 0.

    Args:
        saliency: of each such layer, scores >= 0 in the weight's shape.
        inventory: the model's prunable layers.
        plan: the layers' patterns.
        sparsities: layer -> fraction of zeros, in [0, 1).
        within: earlier masks of the same plan; what they cut stays cut.
        final: layer -> sparsity that later masks within these will reach.
    """
    before, last = within or {}, final or {}
    patterns = {name: PATTERNS.create(plan.layers[name].pattern) for name, value in sparsities.items() if value > 0.0}
    return {
        name: mask_of(
            pattern,
            inventory[name],
            _unit_saliency(saliency, inventory[name], patterns),
            sparsities[name],
            within=before.get(name),
            final_sparsity=max(sparsities[name], last.get(name, 0.0)),
        )
        for name, pattern in patterns.items()
    }


def _unit_saliency(saliency: Mapping[str, Tensor], layer: LayerSpec, patterns: Mapping[str, Pattern]) -> Tensor:
    """A layer's scores; those of a recurrent unit's rows where it is cut as a whole, from both its weights."""
    own, partner = saliency[layer.name], partner_of(layer.name)
    if (
        partner is None
        or partner not in patterns
        or not (patterns[layer.name].whole_filters and patterns[partner].whole_filters)
    ):
        return own
    rows = torch.cat([own, saliency[partner]], dim=1).mean(dim=1, keepdim=True)
    return rows.expand_as(own)


def make_masks(model: nn.Module, inventory: Inventory, plan: Plan, statistics: Mapping[str, LayerStatistics]) -> Masks:
    """Turns a plan into one mask a planned layer; layers at sparsity 0 get none.

    Raises:
        ConfigError: the plan names a layer the model does not have.
    """
    saliency = score_layers(model, inventory, plan, statistics)
    sparsities = {name: plan.layers[name].sparsity for name in saliency}
    return cut_by_criteria(model, inventory, plan, statistics, saliency, sparsities)


def cut_by_criteria(
    model: nn.Module,
    inventory: Inventory,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    saliency: Mapping[str, Tensor],
    sparsities: Mapping[str, float],
    within: Mapping[str, Tensor] | None = None,
    final: Mapping[str, float] | None = None,
) -> Masks:
    """`cut_layers`, where layers whose criterion has several steps are cut in as many.

    Args:
        model: whose weights are cut.
        inventory: likewise of `cut_layers`, as are the other arguments that it has.
        plan: the layers' patterns and criteria.
        statistics: of each layer.
        saliency: the criteria's, by layer.
        sparsities: layer -> fraction of zeros, in [0, 1).
        within: earlier masks of the same plan; what they cut stays cut.
        final: layer -> sparsity that later masks within these will reach.
    """
    before, last = within or {}, final or {}
    stepwise = [name for name in saliency if sparsities[name] > 0.0 and _in_steps(plan, name)]
    rest = {name: share for name, share in sparsities.items() if name not in stepwise}
    masks = cut_layers(saliency, inventory, plan, rest, within, final)
    for name in stepwise:
        masks[name] = _mask_in_steps(
            plan, inventory[name], weight_of(model, name), statistics[name], sparsities[name], before.get(name),
            max(sparsities[name], last.get(name, 0.0)),
        )  # fmt: skip
    return masks


def _in_steps(plan: Plan, name: str) -> bool:
    """Whether cutting a layer in steps makes a difference: whole filters cannot make up for each other."""
    layer = plan.layers[name]
    return CRITERIA.create(layer.criterion).steps > 1 and not PATTERNS.get(layer.pattern.name).whole_filters


def _mask_in_steps(
    plan: Plan,
    layer: LayerSpec,
    weight: Tensor,
    statistics: LayerStatistics,
    sparsity: float,
    within: Tensor | None,
    final: float,
) -> Tensor:
    """A layer's mask, cut in its criterion's steps: each cuts as large a share of what is left.

    Args:
        plan: holds the layer's criterion and pattern.
        layer: as the inventory knows it.
        weight: of the dense layer, as the parameter lies.
        statistics: of the layer.
        sparsity: to reach.
        within: an earlier mask, or None.
        final: the sparsity that later masks within this one will reach.
    """
    planned = plan.layers[layer.name]
    criterion, pattern = CRITERIA.create(planned.criterion), PATTERNS.create(planned.pattern)
    read, cells = as_read(weight, layer.turned), as_read(cells_of(pattern, layer), layer.turned)
    kept = torch.ones_like(weight, dtype=torch.bool) if within is None else within
    feasible = pattern.feasible(layer.weight_shape, sparsity, layer.conv_groups)
    begin, end = int(kept.sum()) / kept.numel(), 1.0 - feasible
    for step in range(1, criterion.steps + 1):
        share = 1.0 - begin * min(1.0, end / begin) ** (step / criterion.steps)
        last = step == criterion.steps
        scores = criterion.saliency_left(read, statistics, as_read(kept, layer.turned), cells, layer.conv_groups)
        rule, share = (pattern, sparsity) if last else (pattern.on_the_way(share), share)
        kept = mask_of(rule, layer, as_held(scores, layer.turned), share, within=kept, final_sparsity=final)
    return kept


def masks_at(
    model: nn.Module,
    inventory: Inventory,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    sparsities: Sequence[float],
) -> dict[str, list[Tensor]]:
    """Layer -> its mask at each sparsity in place of the plan's; layers are ranked once where they can be.

    Layers at sparsity 0 in the plan have none.
    """
    saliency = score_layers(model, inventory, plan, statistics)
    patterns = {name: PATTERNS.create(plan.layers[name].pattern) for name in saliency}
    return {
        name: [
            _mask_in_steps(plan, inventory[name], weight_of(model, name), statistics[name], share, None, share)
            for share in sparsities
        ]
        if _in_steps(plan, name)
        else masks_of(pattern, inventory[name], _unit_saliency(saliency, inventory[name], patterns), sparsities)
        for name, pattern in patterns.items()
    }


def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor], inventory: Inventory | None = None) -> nn.Module:
    """Zeroes the weights the masks cut, in place.

    With the model's inventory, a filter that is cut as a whole falls silent: its bias and its batch norm's weight and
    bias are zeroed too, so that nothing of it is left (see `filter_rows`) and repacking removes it. A recurrent row is
    cut as a whole when it is in both weights of its unit.
    """
    with torch.no_grad():
        for name, mask in masks.items():
            weight_of(model, name).mul_(mask)
            cut = None if inventory is None else silent_filters(inventory[name], masks)
            if inventory is not None and cut is not None:
                for row in filter_rows(model, inventory[name]).values():
                    row.masked_fill_(cut, 0.0)
    return model


def silent_filters(layer: LayerSpec, kept: Mapping[str, Tensor]) -> Tensor | None:
    """The filters of a layer of which nothing is left, ``(out,)``; None where there are none.

    Args:
        layer: whose filters are meant.
        kept: masks, or weights with zeros, by layer.
    """
    rows, partner = ~live_filters(layer, kept[layer.name]), partner_of(layer.name)
    if partner is not None:
        if partner not in kept:
            return None
        rows &= ~live_filters(layer, kept[partner])
    return rows if bool(rows.any()) else None


def live_filters(layer: LayerSpec, kept: Tensor) -> Tensor:
    """The filters of which a mask, or a weight with zeros, leaves anything, ``(out,)``."""
    return as_read(kept, layer.turned).flatten(1).any(dim=1)


def filter_rows(model: nn.Module, layer: LayerSpec) -> dict[str, Tensor]:
    """The parameters with one entry a filter, by name: what is added to the product, and the norm behind it."""
    norms = [] if layer.norm is None else [f"{layer.norm}.{role}".lstrip(".") for role in ("weight", "bias")]
    return {name: _tensor(model, name) for name in (*layer.biases, *norms)}


def _tensor(model: nn.Module, name: str) -> Tensor:
    head, _, tail = name.rpartition(".")
    tensor = getattr(model.get_submodule(head), tail)
    assert isinstance(tensor, Tensor)
    return tensor


def sparsity(mask: Tensor) -> float:
    """Fraction of zeros of a mask (or of a weight), in [0, 1]; 1 where it has no entry."""
    return 1.0 - int(torch.count_nonzero(mask)) / max(1, mask.numel())


def nonzero_parameters(model: nn.Module) -> int:
    """Parameters that are not zero, biases and norms included."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())
