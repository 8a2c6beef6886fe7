"""Criteria: how salient a weight is. One file and one row a criterion."""

from autoprune.criteria.base import Criterion, LayerStatistics
from autoprune.registry import Registry

CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    {
        "magnitude": "autoprune.criteria.magnitude:Magnitude",
        "gradient": "autoprune.criteria.gradient:Gradient",
        "activation": "autoprune.criteria.activation:Activation",
        "fisher": "autoprune.criteria.fisher:Fisher",
        "obs": "autoprune.criteria.obs:Obs",
        "random": "autoprune.criteria.random:Random",
    },
)

__all__ = ["CRITERIA", "Criterion", "LayerStatistics"]
