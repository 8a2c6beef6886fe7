"""What a config's names stand for, created before any work."""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.agents import AGENTS, Agent
from autoprune.config import Config
from autoprune.criteria import CRITERIA
from autoprune.envs.actions import ACTIONS, ActionComponent, ActionSpace
from autoprune.envs.actions.criterion import CriterionChoice
from autoprune.envs.actions.group_size import GroupSize
from autoprune.envs.projection import check_movable
from autoprune.errors import ConfigError
from autoprune.evaluation.dense import check_reseedable
from autoprune.evaluation.devices import DEVICES, Device
from autoprune.evaluation.recovery import RECOVERIES, Recovery
from autoprune.latency.engines import ENGINES
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.tasks import TASKS
from autoprune.training import TRAINING


@dataclass(frozen=True)
class Choices:
    """What a config's names stand for, created once, so that a wrong one is refused before any work.

    Attributes:
        actions: what the agent may choose, in the config's order.
        recovery: between masking and scoring.
        agent: searches for the plan; it may hold what it has learned.
        patterns: every pattern a plan of the run can name; the config's own is among them.
        statistics: what calibration must collect for the criteria that a plan can name.
        device: that measures latency.
    """

    actions: tuple[ActionComponent, ...]
    recovery: Recovery
    agent: Agent
    patterns: tuple[Choice, ...]
    statistics: frozenset[str]
    device: Device


def create_choices(config: Config, task_given: bool = False) -> Choices:
    """Creates what the config names.

    Args:
        config: of the run.
        task_given: whether the task comes from the caller, so that the config's is not looked up.

    Raises:
        ConfigError: it names a row no registry has, or choices that do not go together.
    """
    env = config.env
    PATTERNS.create(env.pattern)  # a plan names patterns and methods, and each is created where it is applied: methods
    TRAINING.create(config.finetune.method)  # have a state. Here their arguments are checked.
    criterion = CRITERIA.create(env.criterion)
    recovery = RECOVERIES.create(env.recovery)
    _check_post_training(config, recovery)
    for engine in config.latency.engines:
        ENGINES.get(engine)
    actions = tuple(ACTIONS.create(choice) for choice in env.actions)
    for choice, action in zip(env.actions, actions, strict=True):
        if action.needs_training and not recovery.trains:
            raise ConfigError(
                f"the action {choice.name!r} would never reach the reward: recovery {env.recovery.name!r} does "
                'not train. Set env.recovery = {name = "train", steps = 20}, or drop the action.'
            )
    ActionSpace(list(zip(env.actions, actions, strict=True))).check_precision(config.precision)
    if not task_given:
        TASKS.get(config.task.name)
    check_teachers(config, task_given)
    sized = [pattern for action in actions if isinstance(action, GroupSize) for pattern in action.patterns]
    chosen = [name for action in actions if isinstance(action, CriterionChoice) for name in action.names]
    if config.search.rules:
        for pattern in config.search.patterns:
            check_movable(pattern)
        sized += config.search.patterns
        chosen += [choice.name for choice in config.search.criteria]
    recovery.check_criteria([env.criterion.name, *chosen])
    device = DEVICES.create(config.device)
    _check_device(config, device)
    return Choices(
        actions,
        recovery,
        AGENTS.create(config.search.agent),
        patterns=tuple(dict.fromkeys([*sized, env.pattern])),
        statistics=criterion.needs.union(*(CRITERIA.get(name).needs for name in chosen)),
        device=device,
    )


def _check_post_training(config: Config, recovery: Recovery) -> None:
    """Raises ConfigError where nothing is to be trained, and something would be."""
    if not config.finetune.post_training:
        return
    if recovery.trains:
        raise ConfigError(
            f"finetune.post_training trains nothing, and recovery {config.env.recovery.name!r} does: set env.recovery "
            "to post_training, reconstruct or batch_norm."
        )
    if config.search.halving is not None:
        raise ConfigError("finetune.post_training trains nothing, and search.halving does: leave one of them out.")


def check_teachers(config: Config, task_given: bool = False) -> None:
    """Raises ConfigError when more teachers than the dense model are asked for that cannot be had, or not be heard."""
    finetune = config.finetune
    if finetune.teachers == 1:
        return
    if task_given:
        raise ConfigError("finetune.teachers must be 1 for a task that is given: it has the one model.")
    check_reseedable(config.task)
    if finetune.settings.get("distillation_weight", 0) == 0 and all(
        choice.name != "distillation" for choice in config.env.actions
    ):
        raise ConfigError(
            f"finetune.teachers is {finetune.teachers}, but nothing is distilled from them: set "
            "finetune.settings.distillation_weight above 0, or finetune.teachers to 1."
        )


def _check_device(config: Config, device: Device) -> None:
    """Raises ConfigError where the config asks a device that runs no torch for what only this process can time."""
    if device.runs_torch:
        return
    if config.latency.threads != 1:
        raise ConfigError(f"latency.threads must be 1 on {device}, not {config.latency.threads}: programs time one.")
    if config.latency.engines:
        raise ConfigError(
            f"latency.engines are dense engines of this machine, and latency is measured on {device}: leave them out. "
            "There the pruned model is compared with the dense model repacked."
        )
    if config.target.over == "eager":
        raise ConfigError(
            f'target.over = "eager" cannot be measured on {device}, where no torch runs: leave it out. A speed-up '
            "there is over the dense model repacked."
        )
