"""TQC (Kuznetsov et al. 2020): SAC whose critics tell distributions, their highest quantiles left out."""

from __future__ import annotations

from typing import cast

from stable_baselines3 import SAC

from autoprune.agents.sac import SACAgent
from autoprune.extras import needs

with needs("rivals", "the agent 'tqc'"):
    from sb3_contrib import TQC


class TQCAgent(SACAgent):
    """As SAC, by sb3-contrib."""

    name = "tqc"

    def algorithm(self) -> type[SAC]:
        return cast("type[SAC]", TQC)  # a sibling of SAC's, with its arguments
