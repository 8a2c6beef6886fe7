"""Action components: what an agent may choose. One file and one row a component; they concatenate into one Box."""

from autoprune.envs.actions.base import ActionComponent, ActionSpace
from autoprune.envs.actions.components import ACTIONS

__all__ = ["ACTIONS", "ActionComponent", "ActionSpace"]
