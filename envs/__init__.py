"""Gymnasium environments: ``autoprune/Prune-v0`` makes a plan an episode, ``autoprune/Steer-v0`` trains one."""

from autoprune.envs.problem import Problem
from autoprune.envs.prune import PruneEnv
from autoprune.envs.steer import SteerEnv, SteerProblem
from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.registration import ENV_ID, STEER_ID

__all__ = ["ENV_ID", "STEER_ID", "Problem", "PruneEnv", "Sensitivity", "SteerEnv", "SteerProblem"]
