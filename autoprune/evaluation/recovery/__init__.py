"""Recovery: what is done to a masked model before it is scored. One file and one row a recovery.

Accuracy straight after masking ranks plans badly; a cheap recovery, stated in the config, ranks them better.
"""

from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.registry import Registry

RECOVERIES: Registry[Recovery] = Registry(
    "recovery",
    {
        "none": "autoprune.evaluation.recovery.none:NoRecovery",
        "batch_norm": "autoprune.evaluation.recovery.batch_norm:BatchNorm",
        "reconstruct": "autoprune.evaluation.recovery.reconstruct:Reconstruct",
        "post_training": "autoprune.evaluation.recovery.post_training:PostTraining",
        "train": "autoprune.evaluation.recovery.train:Train",
    },
)

__all__ = ["RECOVERIES", "Recovery", "Subject"]
