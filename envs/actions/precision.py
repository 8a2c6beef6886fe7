"""Layer action: the precision that the layer is repacked in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from autoprune.envs.actions.base import ActionComponent, Scope, centres, pick
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.precision import OF_LAYERS, OfLayer


class LayerPrecision(ActionComponent):
    """Picks one of `options`, each ``float32`` or ``int8``, in a problem whose precision is ``planned``.

    Where another action guides the solver, it keeps what is picked here.
    """

    scope: ClassVar[Scope] = "layer"
    plans_precision: ClassVar[bool] = True

    def __init__(self, options: Sequence[OfLayer] = OF_LAYERS) -> None:
        if not options or any(option not in OF_LAYERS for option in options):
            raise ConfigError(f"action 'precision': options are some of {', '.join(OF_LAYERS)}, not {list(options)!r}.")
        self.options = tuple(options)

    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        assert layer is not None
        chosen = pick(self.options, unit)
        partial = partial.with_layer(layer, replace(partial.layers[layer], precision=chosen))
        return replace(partial, precisions={**partial.precisions, layer: chosen})

    def anchors(self) -> tuple[float, ...]:
        return centres(len(self.options))
