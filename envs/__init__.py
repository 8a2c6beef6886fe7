"""The Gymnasium environment ``autoprune/Prune-v0``: one episode makes one plan for one problem."""

import gymnasium

from autoprune.envs.problem import Problem
from autoprune.envs.prune import PruneEnv
from autoprune.evaluation.sensitivity import Sensitivity

ENV_ID = "autoprune/Prune-v0"

if ENV_ID not in gymnasium.registry:
    gymnasium.register(id=ENV_ID, entry_point="autoprune.envs.prune:PruneEnv")

__all__ = ["ENV_ID", "Problem", "PruneEnv", "Sensitivity"]
