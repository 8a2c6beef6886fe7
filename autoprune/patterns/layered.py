"""A pattern on a layer: on the weight as its operator reads it, a recurrent unit's gates side by side.

A parameter may hold that the other way round (`as_read`). Masks and scores lie as their parameter does.

Rows of a recurrent weight are gates of units. Patterns see a unit's rows together, so that a group of filters covers
whole units and the packed cell reads its gates without a gather; patterns of whole filters see a unit as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from autoprune.model.recurrent.names import by_gate, by_unit
from autoprune.model.weights import as_held, as_read
from autoprune.patterns.base import Pattern
from autoprune.plan import LayerSpec


def seen_by(pattern: Pattern, layer: LayerSpec, values: Tensor) -> Tensor:
    """`values` that lie as the layer's parameter, as the pattern sees them."""
    units = by_unit(as_read(values, layer.turned), layer.gates)
    return units.reshape(len(units) // layer.gates, -1) if layer.gates > 1 and pattern.whole_filters else units


def put_back(layer: LayerSpec, values: Tensor) -> Tensor:
    """The opposite of `seen_by`."""
    return as_held(by_gate(values.reshape(layer.weight_shape), layer.gates), layer.turned)


def cells_of(pattern: Pattern, layer: LayerSpec) -> Tensor:
    """The cell of each weight of the layer, int64 from 0, as the parameter lies."""
    whole = layer.gates > 1 and pattern.whole_filters
    shape = (layer.weight_shape[0] // layer.gates, layer.weight_shape[1] * layer.gates) if whole else layer.weight_shape
    return put_back(layer, pattern.cells(shape, layer.conv_groups))


def cells_within(pattern: Pattern, layer: LayerSpec, saliency: Tensor, mask: Tensor) -> Tensor:
    """The cells of which `mask`, one of the pattern, is made, as the parameter lies.

    They are those of `cells_of`, unless the pattern chooses which weights share one: then those it chooses by
    `saliency`, scores >= 0, among the ones that fit the mask.
    """
    seen = seen_by(pattern, layer, saliency.masked_fill(~mask, -1.0))
    cut = 1.0 - int(mask.sum()) / mask.numel()
    return put_back(layer, pattern.arrange(seen, cut, layer.conv_groups))


def mask_of(
    pattern: Pattern,
    layer: LayerSpec,
    saliency: Tensor,
    sparsity: float,
    within: Tensor | None = None,
    final_sparsity: float | None = None,
) -> Tensor:
    """The pattern's mask of the layer; the arguments are those of `Pattern.mask`, as the parameter lies."""
    before = None if within is None else seen_by(pattern, layer, within)
    seen = seen_by(pattern, layer, saliency)
    return put_back(layer, pattern.mask(seen, sparsity, layer.conv_groups, before, final_sparsity))


def masks_of(pattern: Pattern, layer: LayerSpec, saliency: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """`mask_of` at each sparsity."""
    masks = pattern.masks(seen_by(pattern, layer, saliency), sparsities, layer.conv_groups)
    return [put_back(layer, mask) for mask in masks]
