"""Tasks: model + data + metric under a name in a config, and the model zoo. One file and one row a task."""

from autoprune.registry import Registry
from autoprune.tasks.base import Task
from autoprune.tasks.batches import ShiftFlip, TensorBatches
from autoprune.tasks.evaluations import EVALUATIONS, accuracy, minus_bits
from autoprune.tasks.losses import LOSSES
from autoprune.tasks.zoo import MODELS

TASKS: Registry[Task] = Registry(
    "task",
    {
        "digits": "autoprune.tasks.digits:digits",
        "fashion_mnist": "autoprune.tasks.fashion_mnist:fashion_mnist",
        "japanese_vowels": "autoprune.tasks.japanese_vowels:japanese_vowels",
        "mnist": "autoprune.tasks.mnist:mnist",
        "moby_dick": "autoprune.tasks.moby_dick:moby_dick",
        "spoken_digits": "autoprune.tasks.spoken_digits:spoken_digits",
        "user": "autoprune.tasks.user:user",
    },
)

__all__ = [
    "EVALUATIONS", "LOSSES", "MODELS", "TASKS", "ShiftFlip", "Task", "TensorBatches", "accuracy", "minus_bits",
]  # fmt: skip
