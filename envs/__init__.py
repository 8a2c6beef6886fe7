"""The Gymnasium environment ``autoprune/Prune-v0``: one episode makes one plan for one problem."""

from autoprune.envs.problem import Problem
from autoprune.envs.prune import PruneEnv
from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.registration import ENV_ID

__all__ = ["ENV_ID", "Problem", "PruneEnv", "Sensitivity"]
