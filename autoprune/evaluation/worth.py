"""Which layers are worth pruning: those whose pruning saves time."""

from __future__ import annotations

from autoprune.errors import AutopruneError
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import Inventory, KeptDense


def worth_pruning(inventory: Inventory, table: LatencyTable, max_sparsity: float, min_saving: float) -> Inventory:
    """Leaves out the layers that could save too little: their weights are worth more than their time.

    Args:
        inventory: what could be pruned.
        table: what pruning it saves.
        max_sparsity: of any layer.
        min_saving: least share of the repacked dense model's time that a layer must be able to save.

    Raises:
        AutopruneError: when nothing is left.
    """
    layers, dense, whole_ms = [], list(inventory.dense), table.unpruned_ms
    for layer in inventory.layers:
        share = table.saving_us(layer.name, max_sparsity) / 1e3 / whole_ms
        if share >= min_saving:
            layers.append(layer)
        else:
            reason = f"pruning it saves at most {100 * share:.1f}% of the repacked model's time"
            dense.append(KeptDense(layer.name, layer.kind, reason))
    if not layers:
        raise AutopruneError(
            f"no layer is worth pruning: none could save {100 * min_saving:g}% of the {whole_ms:.3f} ms that the dense "
            "model takes when it is repacked. Use repack alone, or lower env.min_saving."
        )
    return Inventory(tuple(layers), tuple(dense))
