"""Sparse training: the one training loop, and the methods that prune while it runs. One file and one row a method."""

from autoprune.registry import Registry
from autoprune.training.base import Pruner, Signals, SparseTraining
from autoprune.training.batch_norm import recalibrate_batch_norm_
from autoprune.training.loop import OnSignals, TrainingResult, train_

TRAINING: Registry[SparseTraining] = Registry(
    "training method",
    {
        "one_shot": "autoprune.training.one_shot:OneShot",
        "gradual": "autoprune.training.gradual:Gradual",
        "ac_dc": "autoprune.training.ac_dc:AcDc",
        "adaptive": "autoprune.training.adaptive:Adaptive",
        "admm": "autoprune.training.admm:Admm",
        "bayesian": "autoprune.training.bayesian:Bayesian",
        "expand": "autoprune.training.expand:Expand",
        "joint": "autoprune.training.joint:Joint",
        "proximal": "autoprune.training.proximal:Proximal",
        "rigl": "autoprune.training.rigl:Rigl",
        "sr_ste": "autoprune.training.sr_ste:SrSte",
        "steered": "autoprune.training.steered:Steered",
        "thresholds": "autoprune.training.thresholds:Thresholds",
    },
)

__all__ = [
    "TRAINING",
    "OnSignals",
    "Pruner",
    "Signals",
    "SparseTraining",
    "TrainingResult",
    "recalibrate_batch_norm_",
    "train_",
]
