"""``autoprune/Steer-v0``: an episode is one pruning run of one task at one target, a step a slice of its training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from autoprune.allocation import Cost, WeightCost
from autoprune.checks import check_counts, check_numbers
from autoprune.envs.prune import Action, Observation, StepError, units_of
from autoprune.errors import ConfigError, FileError, NumericalError
from autoprune.files import read_json, write_json
from autoprune.masks import Batches, Masks
from autoprune.model.inventory import Inventory
from autoprune.plan import Plan
from autoprune.registration import STEER_ID
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.training import TRAINING, Pruner, SparseTraining
from autoprune.training.loop import SteppedTraining
from autoprune.training.steered import Steered
from autoprune.training.steering import ACTION_NAMES, LIMIT, OBSERVATION_NAMES, SLICES

FIXED: Mapping[str, Choice] = {rule: Choice("gradual", {"allocation": rule}) for rule in ("uniform", "erk", "lamp")}
"""The fixed schedules that a reward compares with: a cubic, each with one rule."""
STEPS = 4  # optimizer steps of a slice
WORST = -10.0  # what a training is worth that diverges
_LOSS = OBSERVATION_NAMES.index("calibration loss")
_EPISODE = "episode.json"


@dataclass(frozen=True, eq=False)
class SteerProblem:
    """A task and a target that a training is steered to.

    Attributes:
        name: of the problem.
        task: its data, loss and score.
        dense: the trained dense model, in eval mode.
        inventory: its prunable layers.
        plan: what is pruned; its cost is the target, and is met exactly, in whole cells.
        settings: of every training; how long it is, slices and their steps say.
        stake: of the score, what a reward of 1 is worth, > 0: about what the best fixed schedule loses.
        cost: what the budget counts; the weights left when None.
        fixed: training seed -> fixed schedule -> its score; filled as scores are asked for.
    """

    name: str
    task: Task
    dense: nn.Module
    inventory: Inventory
    plan: Plan
    settings: TrainingSettings = TrainingSettings(learning_rate=0.02)  # noqa: RUF009 - frozen
    stake: float = 0.03
    cost: Cost | None = None
    fixed: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)

    @cached_property
    def dense_score(self) -> float:
        """On the validation split."""
        return self.task.evaluate(self.dense)

    def training(self, method: SparseTraining, slices: int, steps: int, seed: int) -> Steering:
        """A training of a copy of the dense model that has not taken a step."""
        model = copy.deepcopy(self.dense)
        cost = self.cost or WeightCost(self.inventory)
        pruner = Pruner(model, self.inventory, self.plan, self.task.calibration, self.task.loss, cost)
        settings = self.settings.changed({"epochs": slices, "max_steps": None})
        taken = SteppedTraining(
            model, Slices(self.task.train, steps), self.task.loss, settings, seed=seed, method=method, pruner=pruner,
            teachers=(self.dense,),
        )  # fmt: skip
        return Steering(model, method, taken)

    def trained(self, method: SparseTraining, slices: int, steps: int, seed: int) -> Steering:
        """Such a training, taken to its end."""
        training = self.training(method, slices, steps, seed)
        for _ in range(slices):
            training.steps.advance()
        return training

    def fixed_scores(self, slices: int, steps: int, seed: int) -> Mapping[str, float]:
        """What fixed schedules score on the validation split after as many steps on the same batches, by name."""
        key = (slices, steps, seed)
        if key not in self.fixed:
            self.fixed[key] = {
                name: self.task.evaluate(self.trained(TRAINING.create(choice), *key).model)
                for name, choice in FIXED.items()
            }
        return self.fixed[key]


@dataclass(frozen=True)
class Steering:
    """A training under way: the model, its method, and what takes its steps, a slice at a time."""

    model: nn.Module
    method: SparseTraining
    steps: SteppedTraining

    @property
    def masks(self) -> Masks:
        return self.method.finish()


@dataclass(frozen=True)
class Slices:
    """Batches in slices of so many, each of a fresh pass over the data, or of several where it is short.

    So an epoch of the training loop is a slice, and begins with random numbers of its own.
    """

    batches: Batches
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        given = 0
        while given < self.count:
            before = given
            for batch in self.batches:
                yield batch
                given += 1
                if given == self.count:
                    return
            if given == before:
                raise ConfigError("there are no batches to train on: the task's data is empty.")


class _ByHand(Steered):
    """Steered by the environment's caller, who has the turn between two slices."""

    def turn(self) -> None:
        pass


class SteerEnv(gymnasium.Env[Observation, Action]):
    """One episode is one pruning run; a step orders a slice of the fine-tuning and trains it.

    Observation: `OBSERVATION_NAMES`, fixed length, scale-free. Action: ``Box[-1, 1]``, one entry a name of
    `ACTION_NAMES`; 0 is a cubic schedule, almost all by LAMP. Reward at the end: the validation score minus that of the
    best fixed schedule on the same problem, seed, steps and batches, in units of the problem's `stake`. On the way:
    what the loss on the calibration batches falls, potential-based, which changes no episode's return. The last step
    meets the target exactly, whatever was ordered; its ``info["steering"]`` holds scores, sparsity, problem and seed.

    Args:
        problems: drawn from alike; what they hold is shared by episodes, and never changed.
        slices: steps of an episode, 1 or more.
        steps: optimizer steps of a slice, 1 or more.
        seeds: of trainings, drawn from alike, 1 or more; fixed schedules are trained once for each problem and seed.
        shaping: weight of the shaping, 0 or more.

    Raises:
        ConfigError: there is no problem, or an argument is out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it so
    gamma = 1.0  # the shaping telescopes with this discount alone

    def __init__(
        self,
        problems: Sequence[SteerProblem] | SteerProblem,
        slices: int = SLICES,
        steps: int = STEPS,
        seeds: int = 4,
        shaping: float = 0.1,
    ) -> None:
        self.problems = (problems,) if isinstance(problems, SteerProblem) else tuple(problems)
        if not self.problems or not all(isinstance(each, SteerProblem) for each in self.problems):
            raise ConfigError(f"{STEER_ID} needs problems (autoprune.envs.steer.SteerProblem), not {problems!r:.60}.")
        check_counts(STEER_ID, {"slices": slices, "steps": steps, "seeds": seeds})
        check_numbers(STEER_ID, {"shaping": shaping}, 0.0)
        self.slices, self.steps, self.seeds, self.shaping = slices, steps, seeds, float(shaping)
        self.action_space: spaces.Box = spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)  # type: ignore[assignment]
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (len(OBSERVATION_NAMES),), np.float32)
        self._under_way: tuple[_ByHand, Steering] | None = None
        self._drawn = (0, 0)  # problem and training seed
        self._seen: list[float] = []

    @property
    def observation_names(self) -> tuple[str, ...]:
        """What each number of an observation is."""
        return OBSERVATION_NAMES

    @property
    def action_names(self) -> tuple[str, ...]:
        """What each number of an action orders."""
        return ACTION_NAMES

    @property
    def steps_per_episode(self) -> int:
        """As many as slices."""
        return self.slices

    @property
    def problem(self) -> SteerProblem:
        """Of the present episode."""
        return self.problems[self._drawn[0]]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode.

        Args:
            seed: of what is drawn.
            options: ``{"problem": index, "seed": of the training}`` in place of what would be drawn; either may be left
                out.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        super().reset(seed=seed)
        drawn = {"problem": self.np_random.integers(len(self.problems)), "seed": self.np_random.integers(self.seeds)}
        chosen = {**drawn, **(options or {})}
        if chosen.keys() != drawn.keys() or not 0 <= chosen["problem"] < len(self.problems) or chosen["seed"] < 0:
            raise ConfigError(
                f"options of {STEER_ID} are problem, an index below {len(self.problems)}, and seed, 0 or more, not "
                f"{options!r:.80}."
            )
        self._begin(int(chosen["problem"]), int(chosen["seed"]))
        return self._observe(), {"problem": self.problem.name, "seed": self._drawn[1]}

    def _begin(self, problem: int, seed: int) -> None:
        self._drawn = (problem, seed)
        method = _ByHand(slices=self.slices)
        self._under_way = method, self.problem.training(method, self.slices, self.steps, seed)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._under_way is None:
            raise StepError("there is no episode to take a step in: call reset() first, and again after the last step.")
        units = units_of(action, self.action_space, ACTION_NAMES)
        method, training = self._under_way
        before, over = self._potential(), False
        try:
            method.steer([float(each) for each in units])
            training.steps.advance()
            observation = self._observe()
            over = len(training.steps.losses) == self.slices
        except NumericalError as error:
            self._under_way = None
            told = {**self._about(), "failed": str(error), "advantage": WORST}
            return self._last(), WORST - before, True, False, {"steering": told}
        if not over:
            return observation, self._potential() - before, False, False, {}
        self._under_way = None
        result = self._result(training)
        return observation, result["advantage"] - before, True, False, {"steering": result}

    def _observe(self) -> Observation:
        assert self._under_way is not None
        self._seen = self._under_way[0].observe()
        return self._last()

    def _last(self) -> NDArray[np.float32]:
        return np.array(self._seen, np.float32)

    def _potential(self) -> float:
        """0 at the start, and taken as 0 at the end."""
        return -self.shaping * self._seen[_LOSS]

    def _about(self) -> dict[str, Any]:
        return {"problem": self.problem.name, "seed": self._drawn[1]}

    def _result(self, training: Steering) -> dict[str, Any]:
        problem, masks = self.problem, training.masks
        score = problem.task.evaluate(training.model)
        fixed = problem.fixed_scores(self.slices, self.steps, self._drawn[1])
        cut = sum(int((~mask).sum()) for mask in masks.values())
        return {
            **self._about(),
            "score": score,
            "dense": problem.dense_score,
            "fixed": dict(fixed),
            "sparsity": cut / sum(problem.inventory[name].weights for name in problem.plan.layers),
            "advantage": (score - max(fixed.values())) / problem.stake,
        }

    def save(self, folder: Path) -> None:
        """Writes the episode, which may be in its middle, and what draws the following ones into `folder`.

        Raises:
            StepError: there is no episode.
        """
        if self._under_way is None:
            raise StepError("there is no episode to save: call reset() first.")
        self._under_way[1].steps.save(folder)
        about = {"problem": self.problem.name, "seed": self._drawn[1], "seen": self._seen}
        sizes = {"slices": self.slices, "steps": self.steps}
        write_json(folder / _EPISODE, {**about, **sizes, "draws": self.np_random.bit_generator.state})

    def load(self, folder: Path) -> Observation:
        """Goes on with an episode that `save` wrote, as if it had never stopped, and returns its last observation.

        Raises:
            FileError: there is none, it is corrupt, or it is of an environment with other arguments.
        """
        about = read_json(folder / _EPISODE, "the episode")
        names = [each.name for each in self.problems]
        try:
            if about["problem"] not in names or (about["slices"], about["steps"]) != (self.slices, self.steps):
                raise ValueError("it is of another problem, or of other slices")
            problem, seed = names.index(about["problem"]), int(about["seed"])
            seen = [float(value) for value in about["seen"]]
            if len(seen) != len(OBSERVATION_NAMES) or seed < 0:
                raise ValueError("it holds another observation")
            self.np_random.bit_generator.state = about["draws"]
        except (LookupError, TypeError, ValueError) as error:
            raise FileError(f"the episode in {folder} does not fit this environment ({error}).") from None
        self._begin(problem, seed)
        assert self._under_way is not None
        self._under_way[1].steps.load_(folder)
        self._seen = seen
        return self._last()
