"""A pattern on a layer: on a weight as it is, or on a recurrent one with the gates of each unit side by side.

Rows of a recurrent weight are gates of units. Patterns see a unit's rows together, so that a group of filters covers
whole units and the packed cell reads its gates without a gather; patterns of whole filters see a unit as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from autoprune.model.recurrent.names import by_gate, by_unit
from autoprune.patterns.base import Pattern
from autoprune.plan import LayerSpec


def seen_by(pattern: Pattern, layer: LayerSpec, values: Tensor) -> Tensor:
    """`values`, in the shape of the layer's weight, as the pattern sees them."""
    turned = by_unit(values, layer.gates)
    return turned.reshape(len(turned) // layer.gates, -1) if layer.gates > 1 and pattern.whole_filters else turned


def put_back(layer: LayerSpec, values: Tensor) -> Tensor:
    """The opposite of `seen_by`."""
    return by_gate(values.reshape(layer.weight_shape), layer.gates)


def cells_of(pattern: Pattern, layer: LayerSpec) -> Tensor:
    """The cell of each weight of the layer, int64 from 0, in the weight's shape."""
    whole = layer.gates > 1 and pattern.whole_filters
    shape = (layer.weight_shape[0] // layer.gates, layer.weight_shape[1] * layer.gates) if whole else layer.weight_shape
    return put_back(layer, pattern.cells(shape, layer.conv_groups))


def mask_of(
    pattern: Pattern,
    layer: LayerSpec,
    saliency: Tensor,
    sparsity: float,
    within: Tensor | None = None,
    final_sparsity: float | None = None,
) -> Tensor:
    """The pattern's mask of the layer; the arguments are those of `Pattern.mask`, in the weight's shape."""
    before = None if within is None else seen_by(pattern, layer, within)
    seen = seen_by(pattern, layer, saliency)
    return put_back(layer, pattern.mask(seen, sparsity, layer.conv_groups, before, final_sparsity))


def masks_of(pattern: Pattern, layer: LayerSpec, saliency: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """`mask_of` at each sparsity."""
    masks = pattern.masks(seen_by(pattern, layer, saliency), sparsities, layer.conv_groups)
    return [put_back(layer, mask) for mask in masks]
