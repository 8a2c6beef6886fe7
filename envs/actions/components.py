"""The registry of action components."""

from autoprune.envs.actions.base import ActionComponent
from autoprune.registry import Registry

ACTIONS: Registry[ActionComponent] = Registry(
    "action",
    {
        "sparsity": "autoprune.envs.actions.sparsity:Sparsity",
        "group_size": "autoprune.envs.actions.group_size:GroupSize",
        "criterion": "autoprune.envs.actions.criterion:CriterionChoice",
        "training_method": "autoprune.envs.actions.training_method:TrainingMethod",
        "method_strength": "autoprune.envs.actions.method_strength:MethodStrength",
        "learning_rate": "autoprune.envs.actions.learning_rate:LearningRate",
        "distillation": "autoprune.envs.actions.distillation:Distillation",
    },
)
