"""The precisions that a layer, a model or the models of a run can have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

OfLayer = Literal["float32", "int8"]
"""Of one layer."""

OF_LAYERS: tuple[OfLayer, ...] = get_args(OfLayer)

Precision = Literal["float32", "bf16", "int8", "mixed"]
"""Which layers are rounded: ``bf16``, weights and inputs to bfloat16 where that is faster on this machine; ``int8``,
weights and activations to bytes wherever a layer can be; ``mixed``, to bytes where that costs little."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

ModelPrecision = Precision | Mapping[str, OfLayer]
"""Of a whole model, or layer by layer: a layer that is not named is float32."""

RunPrecision = Literal["float32", "int8", "mixed", "planned"]
"""Of the repacked models of a run; ``planned``: each layer has what the plan says of it."""

RUN_PRECISIONS: tuple[RunPrecision, ...] = get_args(RunPrecision)


def choices_of_layers(run: RunPrecision) -> tuple[OfLayer, ...]:
    """What a plan's layers may be, in a run of this precision; but for ``planned`` there is no choice."""
    return OF_LAYERS if run == "planned" else ("float32",)
