"""The one adapter between stable-baselines3 and the harness."""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from autoprune.agents.base import Agent, OnFigures, OnTrial
from autoprune.agents.checkpoint import checkpoint_episodes, load_checkpoint_, save_checkpoint
from autoprune.agents.episodes import Episodes
from autoprune.agents.policy_file import save_policy
from autoprune.checks import check_counts, check_numbers
from autoprune.envs.prune import PruneEnv
from autoprune.envs.trial import Trial
from autoprune.errors import ConfigError
from autoprune.registry import Choice

WIDEST, DEEPEST, MOST = 2**12, 8, 2**16  # of a network, and of anything that is counted: arguments come from files


def check_arguments(agent: str, net: Sequence[int], learning_rate: Any, counts: Mapping[str, Any]) -> None:
    """Raises ConfigError unless layers are few and narrow enough to be built, and the common numbers in range."""
    wide = isinstance(net, (list, tuple)) and all(type(width) is int and 0 < width <= WIDEST for width in net)
    if not wide or not 0 < len(net) <= DEEPEST:
        raise ConfigError(
            f"agent {agent!r}: net must be 1 to {DEEPEST} widths of layers from 1 to {WIDEST}, not {reprlib.repr(net)}."
        )
    check_counts(f"agent {agent!r}", counts, most=MOST)
    check_numbers(f"agent {agent!r}", {"learning_rate": learning_rate}, 1e-9, 1.0)


class SB3Agent(Agent):
    """A stable-baselines3 algorithm; members say how to build theirs.

    Attributes:
        name: the registry row, written into the policy file.
    """

    name: str
    on_policy: ClassVar[bool] = False  # whether it learns from episodes side by side
    checkpoint_every = 10  # episodes; what is lost to a kill is replayed from the cache of evaluated plans

    def __init__(self) -> None:
        self._model: BaseAlgorithm | None = None
        self._on_figures: OnFigures | None = None

    def watch(self, on_figures: OnFigures) -> None:
        self._on_figures = on_figures

    @abstractmethod
    def build(self, env: Episodes, seed: int) -> BaseAlgorithm:
        """Returns the untrained algorithm, whose updates start and end at episode boundaries."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, so that a policy file can rebuild the same network."""

    def on_search(self, model: BaseAlgorithm, episodes: int) -> None:
        """Called once, before the first episode, with how many are to be played."""

    def on_episode(self, model: BaseAlgorithm, progress: float) -> None:
        """Called before each episode (or batch of them) with the share of the search that is over."""

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        model = self._model = self.build(env, seed)
        recorder = _Recorder(self, on_trial, directory, episodes, done)
        shown: list[KVWriter] = [] if self._on_figures is None else [_Figures(self._on_figures, recorder)]
        # not the default one, which leaves a folder behind each search
        model.set_logger(Logger(folder=None, output_formats=shown))
        if directory is not None and done:
            load_checkpoint_(directory, model)
        self.on_search(model, episodes - done)
        remaining = (episodes - done) * env.steps_per_episode
        if remaining > 0:
            model.learn(remaining, callback=recorder, log_interval=1, reset_num_timesteps=False)
            model.logger.dump(model.num_timesteps)  # the last update's: the budget ends between two of its dumps
        if directory is not None:
            save_checkpoint(directory, model, episodes)

    def resumable_episodes(self, directory: Path, logged: int) -> int:
        saved = checkpoint_episodes(directory)
        return saved if saved <= logged else 0

    def save_policy(self, directory: Path, env: PruneEnv) -> bool:
        if self._model is None:
            return False
        save_policy(directory, self._model, Choice(self.name, self.arguments()), env)
        return True


class OffPolicyAgent(SB3Agent):
    """Learns from a buffer of all steps, after every episode.

    Args:
        learning_rate: of actor and critics, in [1e-9, 1].
        net: widths of their hidden layers.
        batch_size: steps drawn for a gradient step.
        updates_per_step: gradient steps for each step of the environment.
    """

    def __init__(self, learning_rate: float, net: Sequence[int], batch_size: int, updates_per_step: int) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "updates_per_step": updates_per_step}
        check_arguments(self.name, net, learning_rate, counts)
        self.learning_rate, self.net = learning_rate, tuple(net)
        self.batch_size, self.updates_per_step = batch_size, updates_per_step

    def settings(self, env: Episodes, seed: int) -> dict[str, Any]:
        """What every such algorithm of stable-baselines3 is built with."""
        return {
            "learning_rate": self.learning_rate,
            "buffer_size": 100_000,
            "learning_starts": 0,
            "batch_size": self.batch_size,
            "gamma": env.gamma,
            "train_freq": (1, "episode"),
            "gradient_steps": self.updates_per_step * env.steps_per_episode,
            "seed": seed,
            "device": "cpu",
        }

    def arguments(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "net": list(self.net),
            "batch_size": self.batch_size,
            "updates_per_step": self.updates_per_step,
        }


class _Recorder(BaseCallback):
    """Hands trials on, keeps checkpoints between episodes, stops at the budget."""

    def __init__(self, agent: SB3Agent, on_trial: OnTrial, directory: Path | None, episodes: int, done: int) -> None:
        super().__init__()
        self._agent, self._on_trial, self._directory = agent, on_trial, directory
        self._episodes, self._done = episodes, done
        self._saved = done

    @property
    def last_episode(self) -> int:
        """Index of the last episode that is over."""
        return self._done - 1

    def _on_rollout_start(self) -> None:
        self._agent.on_episode(self.model, self._done / self._episodes)
        if self._directory is not None and self._done - self._saved >= self._agent.checkpoint_every:
            save_checkpoint(self._directory, self.model, self._done)
            self._saved = self._done

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "trial" in info:
                self._done += 1
                self._on_trial(Trial.from_json(info["trial"]))
        return self._done < self._episodes


class _Figures(KVWriter):
    """Hands on what stable-baselines3 logs of its updates, with the episode it was at; not its clock and its counts."""

    def __init__(self, on_figures: OnFigures, recorder: _Recorder) -> None:
        self._on_figures, self._recorder = on_figures, recorder

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        figures = {key: float(value) for key, value in key_values.items() if key.startswith("train/")}
        if figures:
            self._on_figures(self._recorder.last_episode, figures)

    def close(self) -> None:
        """Nothing is held."""
