"""TPE (Bergstra et al. 2011), by Optuna: a model-based search over whole episodes, with no policy to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autoprune.agents.base import Agent, OnTrial, run_episode
from autoprune.checks import check_counts
from autoprune.envs.prune import PruneEnv
from autoprune.extras import needs


class TPEAgent(Agent):
    """Every number of every step of an episode is a parameter in [-1, 1]; what an action does not read has none.

    Args:
        startup: episodes drawn at random before there is a model.
    """

    replays: ClassVar[bool] = True

    def __init__(self, startup: int = 10) -> None:
        check_counts("agent 'tpe'", {"startup": startup})
        with needs("rivals", "the agent 'tpe'"):
            import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self.startup = startup

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup)
        study = self._optuna.create_study(direction="maximize", sampler=sampler)
        for _ in range(episodes):
            asked = study.ask()

            def act(observation: NDArray[np.float32], step: int, asked: Any = asked) -> NDArray[np.float32]:
                scope = "run" if step == 0 else "layer"
                components = zip(env.actions.names, env.actions.components, strict=True)
                units = [
                    asked.suggest_float(f"{step} {name}", -1.0, 1.0) if component.scope == scope else 0.0
                    for name, component in components
                ]
                return np.array(units, np.float32)

            trial = run_episode(env, act)
            study.tell(asked, trial.reward)
            on_trial(trial)
