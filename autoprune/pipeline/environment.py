"""``gymnasium.make("autoprune/Prune-v0", task="digits", target_speedup=3)``: the environment of a task by its name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from autoprune.config import Config, load_config, packaged_configs, parse_config
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.prune import check_episodes, created_actions
from autoprune.errors import ConfigError, did_you_mean
from autoprune.evaluation.measurement import ByTable, CachedEvaluate
from autoprune.files import as_path, cache_folder, check_cache
from autoprune.latency.machine import machine_identity
from autoprune.pipeline.run import Run, withdrawn_if_refused
from autoprune.processes.locks import turn
from autoprune.progress import SILENT, Progress
from autoprune.registration import ENV_ID
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.target import OVER, Over
from autoprune.tasks import TASKS
from autoprune.version import __version__

FOLDER = "environments"  # in the user's cache
_LAST_MADE = "sensitivity.json"  # of what a problem needs
_problems: WeakValueDictionary[str, Problem] = WeakValueDictionary()


# long: a parameter is a keyword of gymnasium.make, and is explained here
def prune_env(
    problem: Problem | None = None,
    *,
    task: str | Path | Mapping[str, Any] | None = None,
    target_speedup: float | None = None,
    target_accuracy_drop: float | None = None,
    target_sparsity: float | None = None,
    target_latency_ms: float | None = None,
    target_size_bytes: int | None = None,
    target_macs: int | None = None,
    target_over: Over | None = None,
    timing: Literal["table", "measured"] | None = None,
    directory: Path | str | None = None,
    actions: Sequence[Choice | str | Mapping[str, Any]] | None = None,
    shaping: float | None = None,
    gamma: float | None = None,
    start: str | None = None,
    curves: bool | None = None,
) -> PruneEnv:
    """The environment of a task, or of a problem that is there.

    The dense model, the latency table and the sensitivity curves are made when they are first needed, in seconds to a
    few minutes, and kept; what is at work is said on stderr. Environments of one process that are asked for alike share
    a problem: a plan that one of them has evaluated costs the others nothing.

    Args:
        problem: such as a run's; in place of `task`, and of all that says what the problem is.
        task: the name of a config that comes along (``"digits"``) or of a task, the path of a config, or a config's
            tables as a dictionary: ``{"task": {"name": "digits", "widths": [8, 16]}, "env": {"max_sparsity": 0.9}}``.
        target_speedup: with the other figures of a target in place of the config's target: see `autoprune.Target`.
        target_accuracy_drop: in (0, 1).
        target_sparsity: in (0, 1).
        target_latency_ms: milliseconds an inference.
        target_size_bytes: of the packed file.
        target_macs: multiply-adds an inference.
        target_over: what a speed-up is over: ``best``, the best dense engine; ``repacked``; or ``eager``.
        timing: of a plan: ``table`` (the default) predicts it by the measured latency table, so that an episode is a
            function of its actions alone; ``measured`` repacks each plan and times it.
        directory: of a run, where everything is kept; None: a folder in the user's cache.
        actions: of `PruneEnv`, likewise the following; None: the config's.
        shaping: 0 or more.
        gamma: the discount, in (0, 1].
        start: ``uniform`` or ``knapsack``.
        curves: whether the layers' curves are observed.

    Raises:
        ConfigError: neither a problem nor a task is given, or both; or something that cannot be used.
        InfeasibleTarget: no plan can reach the target.
        InUse: another process works in `directory`.
    """
    episodes = _given({"shaping": shaping, "gamma": gamma, "start": start, "curves": curves})
    check_episodes(**{"shaping": 0.0, "gamma": 1.0, "start": "uniform", "curves": True, **episodes})  # before any work
    figures = {
        "speedup": target_speedup,
        "accuracy_drop": target_accuracy_drop,
        "sparsity": target_sparsity,
        "latency_ms": target_latency_ms,
        "size_bytes": target_size_bytes,
        "macs": target_macs,
    }
    if task is None:
        of_task: dict[str, Any] = {
            **{f"target_{name}": value for name, value in figures.items()},
            "target_over": target_over,
        }
        of_task |= {"timing": timing, "directory": directory}
        _check_problem(problem, [name for name, value in of_task.items() if value is not None])
        return PruneEnv(problem, **_given({"actions": actions}), **episodes)
    if problem is not None:
        raise ConfigError("give a problem or a task, not both: a problem is all that a task would be made into.")
    config = _config(task, _given(figures), target_over, {"actions": actions, "timing": timing or "table"})
    env, components = config.env, created_actions(config.env.actions)
    components.check_precision(config.precision)
    made = _problem(config, None if directory is None else as_path(directory).resolve())
    of_config = {"shaping": env.shaping, "gamma": env.gamma, "start": env.start, "curves": env.curves}
    return PruneEnv(made, components, **{**of_config, **episodes})


def _given(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if value is not None}


def _check_problem(problem: object, of_task: Sequence[str]) -> None:
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"the environment needs a task or a problem (autoprune.envs.Problem, such as a run's), not {problem!r:.60}"
            f': gymnasium.make("{ENV_ID}", task="digits", target_speedup=3), or problem=run.problem.'
        )
    if of_task:
        raise ConfigError(f"{', '.join(of_task)} cannot be given with a problem, which says that itself.")


def _config(
    task: str | Path | Mapping[str, Any], figures: Mapping[str, Any], over: Over | None, env: Mapping[str, Any]
) -> Config:
    """The config of a task, with what was given in place of what it says."""
    config = _named_config(task)
    data = config.to_json()
    if figures:
        data["target"] = dict(figures)
    if over is not None:
        if over not in OVER:
            raise ConfigError(f"target_over is not {over!r}. {did_you_mean(str(over), OVER)}")
        data["target"] = {**(figures or config.target.to_json()), "over": over}
    if (actions := env["actions"]) is not None:
        if isinstance(actions, str) or not isinstance(actions, Sequence):
            raise ConfigError(f"actions is a list of names or choices, not {actions!r}.")
        choices = [Choice.of(action) for action in actions]
        env = {**env, "actions": [{"name": choice.name, **choice.args} for choice in choices]}
    data["env"] = {**data["env"], **_given(env)}
    return parse_config(data, f"{ENV_ID} of {task!r:.60}")


def _named_config(task: str | Path | Mapping[str, Any]) -> Config:
    if isinstance(task, Mapping):
        return parse_config(task, "task")
    if not isinstance(task, (str, Path)):
        raise ConfigError(
            "task is the name of a task or a config, the path of a config, or its tables as a dictionary, not "
            f"{task!r:.60}."
        )
    packaged = packaged_configs()
    if str(task) in packaged or Path(task).suffix or os.sep in str(task):
        return load_config(Path(task))
    if str(task) not in TASKS:
        names = did_you_mean(str(task), {*packaged, *TASKS})
        raise ConfigError(f"there is no task, and no config, of the name {str(task)!r}. {names}")
    return parse_config({"task": str(task)}, "task")


def _problem(config: Config, directory: Path | None) -> Problem:
    """The problem of a config, as this process has it already, or made now."""
    if directory is None:
        check_cache()
        about = {"config": config.to_json(), "machine": machine_identity(), "autoprune": __version__}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
        directory = cache_folder() / FOLDER / f"{config.task.name}-{digest}"
    key = json.dumps([str(directory), config.to_json()], sort_keys=True)
    known = _problems.get(key)
    if known is None:
        known = _problems[key] = _made(config, directory)
    return known


def _made(config: Config, directory: Path) -> Problem:
    """Makes what the problem lacks; processes that need the same wait for the first of them.

    Nothing is written in the directory afterwards, so that any number of environments can be of one.
    """
    with turn(directory, _progress(directory).say):
        run = Run(config, directory, progress=_progress(directory))
        try:
            with withdrawn_if_refused(directory, run.search):
                posed, problem = run.search.posed, run.search.env.problem  # an environment knows what is out of reach
        finally:
            run.lock.close()
    remembered = CachedEvaluate(posed.evaluator)
    evaluate = remembered if run.context.measures else ByTable(remembered, posed.evaluator.table)
    return replace(problem, evaluate=evaluate)


def _progress(directory: Path) -> Progress:
    """Where work is shown: reading what is there takes no time worth showing."""
    return SILENT if (directory / _LAST_MADE).exists() else Console()
