"""PPO with an LSTM over the layers, in the order they come: it remembers what it has seen of those before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from stable_baselines3 import PPO

from autoprune.agents.ppo import PPOAgent
from autoprune.extras import needs

with needs("rivals", "the agent 'recurrent_ppo'"):
    from sb3_contrib import RecurrentPPO


class RecurrentPPOAgent(PPOAgent):
    """As PPO, by sb3-contrib; states begin anew with every episode."""

    name = "recurrent_ppo"
    policy: ClassVar[str] = "MlpLstmPolicy"
    network: ClassVar[Mapping[str, Any]] = {"lstm_hidden_size": 64}

    def algorithm(self) -> type[PPO]:
        return cast("type[PPO]", RecurrentPPO)  # a sibling of PPO's, with its arguments
