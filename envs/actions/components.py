"""The registry of action components."""

from autoprune.envs.actions.base import ActionComponent
from autoprune.registry import Registry

ACTIONS: Registry[ActionComponent] = Registry(
    "action",
    {
        "sparsity": "autoprune.envs.actions.sparsity:Sparsity",
        "coefficient": "autoprune.envs.actions.coefficient:Coefficient",
        "mix": "autoprune.envs.actions.mix:Mix",
        "group_size": "autoprune.envs.actions.group_size:GroupSize",
        "precision": "autoprune.envs.actions.precision:LayerPrecision",
        "criterion": "autoprune.envs.actions.criterion:CriterionChoice",
        "training_method": "autoprune.envs.actions.training_method:TrainingMethod",
        "method_strength": "autoprune.envs.actions.method_strength:MethodStrength",
        "allocation": "autoprune.envs.actions.allocation:AllocationRule",
        "schedule_begin": "autoprune.envs.actions.schedule:ScheduleBegin",
        "schedule_end": "autoprune.envs.actions.schedule:ScheduleEnd",
        "schedule_exponent": "autoprune.envs.actions.schedule:ScheduleExponent",
        "schedule_rounds": "autoprune.envs.actions.schedule:ScheduleRounds",
        "penalty": "autoprune.envs.actions.penalty:Penalty",
        "regrowth": "autoprune.envs.actions.regrowth:Regrowth",
        "epochs": "autoprune.envs.actions.epochs:Epochs",
        "learning_rate": "autoprune.envs.actions.learning_rate:LearningRate",
        "distillation": "autoprune.envs.actions.distillation:Distillation",
    },
)
