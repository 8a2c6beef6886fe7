"""The latency table."""

from __future__ import annotations

from dataclasses import replace

from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.testing import fake_problem


def test_a_plans_time_does_not_depend_on_the_order_of_layers() -> None:
    """A table just measured has them as they are in the model, one that was read from its file by their names."""
    table = fake_problem().table
    names = list(table.layers)
    for seed in range(20):
        layers = {
            name: LayerPlan(0.05 * ((seed + 7 * at) % 19), Choice("group", {"size": 8}), Choice("magnitude"))
            for at, name in enumerate(names)
        }
        turned = replace(table, layers={name: table.layers[name] for name in reversed(names)})
        assert turned.predict_ms(Plan(layers)) == table.predict_ms(Plan(layers))
