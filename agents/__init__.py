"""Agents: everything that can search for a plan, in one harness. One file and one row an agent."""

from autoprune.agents.base import Agent
from autoprune.registry import Registry

AGENTS: Registry[Agent] = Registry(
    "agent",
    {
        "auto": "autoprune.agents.auto:AutoAgent",
        "random": "autoprune.agents.random:RandomAgent",
        "uniform": "autoprune.agents.uniform:UniformAgent",
        "ppo": "autoprune.agents.ppo:PPOAgent",
        "recurrent_ppo": "autoprune.agents.recurrent_ppo:RecurrentPPOAgent",
        "sac": "autoprune.agents.sac:SACAgent",
        "tqc": "autoprune.agents.tqc:TQCAgent",
        "td3": "autoprune.agents.td3:TD3Agent",
        "ddpg": "autoprune.agents.ddpg:DDPGAgent",
        "greedy": "autoprune.agents.solver:GreedyAgent",
        "knapsack": "autoprune.agents.solver:KnapsackAgent",
        "restarts": "autoprune.agents.restarts:RestartsAgent",
        "tpe": "autoprune.agents.tpe:TPEAgent",
        "cma_es": "autoprune.agents.cma_es:CmaEsAgent",
        "evopress": "autoprune.agents.evopress:EvoPressAgent",
        "policy": "autoprune.agents.pretrained:PretrainedAgent",
    },
)

__all__ = ["AGENTS", "Agent"]
