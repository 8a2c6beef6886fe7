"""Configs: a validated tree <- a TOML file (a short list of differences) <- ``key=value`` overrides."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from autoprune.documents import DEPTH, parse_toml
from autoprune.errors import ConfigError, FileError, did_you_mean
from autoprune.files import read_json, read_text
from autoprune.precision import RunPrecision
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.target import Target

HERE = "process"  # the device that is this process
PACKAGED = Path(__file__).parent / "configs"


def _parse_choice(value: Any) -> Choice:
    if isinstance(value, (Choice, str)) or (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return Choice.of(value)
    raise ValueError("must be a name, or a table with a 'name' and its arguments, e.g. {name = \"group\", size = 8}")


def _write_choice(choice: Choice) -> Any:
    return {"name": choice.name, **choice.args} if choice.args else choice.name


ChoiceField = Annotated[Choice, BeforeValidator(_parse_choice), PlainSerializer(_write_choice)]


def _parse_device(value: Any) -> Choice:
    if isinstance(value, dict) and "name" not in value:
        return Choice("command", value)
    return _parse_choice(value)


DeviceField = Annotated[Choice, BeforeValidator(_parse_device), PlainSerializer(_write_choice)]
"""A device; a table without a name is one of the kind ``command``."""
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


def _check_settings(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be a table of training settings, e.g. {epochs = 4}")
    try:
        TrainingSettings.from_json(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


SettingsField = Annotated[dict[str, Any], BeforeValidator(_check_settings)]
"""Training settings that differ from those that hold otherwise."""


class Section(BaseModel):
    """A table of the config: unknown keys and wrong types are errors; a key left out has the section's own default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Root(Section):
    """A whole config."""

    def to_json(self) -> dict[str, Any]:
        """The resolved config as plain data; equal configs give equal data."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        return data


class LatencySection(Section):
    """How latency is measured, everywhere in the run."""

    batch: Count = 1
    threads: Count = 1
    samples: Annotated[int, Field(ge=3)] = 100  # rounds of the final table
    search_samples: Annotated[int, Field(ge=3)] = 25  # rounds of one trial
    profile_samples: Annotated[int, Field(ge=3)] = 15  # rounds of one cell of the latency table
    engines: tuple[str, ...] = ()  # dense engines in the final table; all that are installed when empty


class EnvSection(Section):
    """The environment: what the agent may choose and how a plan is scored."""

    actions: tuple[ChoiceField, ...] = (Choice("mix"), Choice("coefficient", {"reach": 1.0}))
    pattern: ChoiceField = Choice("group", {"size": 8})  # of layers whose pattern no action sets; in int8: block = 4
    criterion: ChoiceField = Choice("magnitude")
    max_sparsity: Fraction = 0.95
    keep_dense: tuple[str, ...] = ()  # glob patterns of layer names
    min_weights: Count = 64  # smaller layers stay dense
    min_saving: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02  # of the repacked dense time, or it is left whole
    start: Literal["uniform", "knapsack"] = "uniform"  # the plan that layers' actions start from
    recovery: ChoiceField = Choice("reconstruct")  # what happens between masking and scoring
    curves: bool = True  # whether the agent sees the layers' latency and sensitivity curves
    timing: Literal["measured", "table"] = "measured"  # of a trial; "table" predicts it, and repacks nothing
    shaping: Annotated[float, Field(ge=0.0)] = 1.0
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class HalvingSection(Section):
    """Short real training of the plans that look best: successive halving, down to one plan."""

    plans: Annotated[int, Field(ge=2)] = 8  # of the search that are trained
    steps: Count = 100  # optimizer steps of each; `factor` times more for `factor` times fewer, and so on
    factor: Annotated[int, Field(ge=2)] = 2


class SearchSection(Section):
    agent: ChoiceField = Choice("auto")
    episodes: Count = 100
    patience: Count | None = 40  # episodes without a better plan after which the search stops
    rules: bool = True  # whether the plans of the uniform rule, the knapsack and the bundled policy are tried first
    criteria: tuple[ChoiceField, ...] = (Choice("magnitude"), Choice("activation"))  # that rules try
    patterns: tuple[ChoiceField, ...] = ()  # likewise, besides env.pattern; each makes the latency table longer
    finalists: Count = 5  # best trials that are timed again, in turns with each other, before one is chosen; 1: none
    contenders: Count = 1  # plans, the best one and those of rules, that are fine-tuned before one is chosen
    halving: HalvingSection | None = None  # off when absent: the best plan is the one that scored best in the search


class FinetuneSection(Section):
    """Training of the chosen plan's masked model."""

    # in place of training: the model is what env.recovery makes of the plan, and no other key of this section is read
    post_training: bool = False
    method: ChoiceField = Choice("one_shot")
    # what a plan's budget counts for methods that find the layers' shares: latency for a target speed-up, else weights
    budget: Literal["weights", "macs", "latency"] | None = None
    # dense models to distil from, where the settings' distillation_weight is above 0: the run's own, then other seeds'
    teachers: Annotated[int, Field(ge=1, le=5)] = 1
    settings: SettingsField = {}  # what differs from the recipe for such a model: see `training.recipes`


class RepackSection(Section):
    """The file of the repacked model."""

    value_bits: Literal[32, 8] = 32  # 8: weights rounded, one scale a group of filters; what is measured is rounded too


class Config(Root):
    """Everything a run does; each section's comments say what a key means."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    task: ChoiceField
    precision: RunPrecision = "float32"  # of the repacked models, in the search and in the end; "planned": by layer
    dense: SettingsField | None = None  # training of the dense model: what differs from the task's own settings
    target: Target = Target(speedup=2.0)
    device: DeviceField = Choice(HERE)  # that latency is measured on: this process, or what a command runs programs on
    latency: LatencySection = LatencySection()
    env: EnvSection = EnvSection()
    search: SearchSection = SearchSection()
    finetune: FinetuneSection = FinetuneSection()
    repack: RepackSection = RepackSection()


class FamilySection(Section):
    """The tasks a generalist learns from; see `tasks.family`."""

    tasks: Annotated[int, Field(ge=5)] = 40  # drawn; one in five chooses among policies, and is not learned from
    data: tuple[str, ...] = ("digits", "fashion_mnist")
    drops: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = ()  # of the score, as targets beside speed-ups
    plans: Annotated[int, Field(ge=20)] = 120  # of each task, really evaluated, that its surrogate is fitted to


class LearningSection(Section):
    """How a generalist's policy learns."""

    updates: Count = 220
    envs: Count = 24  # episodes side by side, of learners that can
    measured_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02  # of the episodes; the others are the surrogates'
    judge_every: Count = 10  # updates between two judgements of the policy


class GeneralistConfig(Root):
    """Training over a family of tasks; each section's comments say what a key means."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    family: FamilySection
    agent: ChoiceField = Choice(
        "ppo", {"episodes_per_update": 16, "learning_rate": 5e-4, "epochs": 6, "minibatches": 8, "net": [128, 128]}
    )
    learning: LearningSection = LearningSection()
    latency: LatencySection = LatencySection(profile_samples=9)
    env: EnvSection = EnvSection(
        actions=(Choice("mix"), Choice("coefficient", {"reach": 1.0})),
        max_sparsity=0.98,
        min_saving=0.004,
        recovery=Choice("batch_norm"),
        timing="table",
        shaping=0.0,
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML config and applies overrides such as ``search.episodes=50``.

    Args:
        path: of the file; or, where there is no such file, the name of one of `packaged_configs`.
        overrides: ``KEY=VALUE``, values as in TOML.

    Raises:
        FileError: there is no such config.
        ConfigError: something in it cannot be used.
    """
    data = _with_overrides(_read_toml(path), overrides)
    if "family" in data or "steering" in data:
        raise ConfigError(f"{path} is about a family of tasks: 'autoprune train' takes it, no other command.")
    return parse_config(data, str(path))


def has_table(path: Path, name: str) -> bool:
    """Whether the config has a table of this name: ``family`` where a generalist is trained, ``steering`` likewise."""
    return name in _read_toml(path)


def load_as(kind: type[Kind], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """Like `load_config`, for another kind of config."""
    return _validated(kind, _with_overrides(_read_toml(path), overrides), str(path))


def load_generalist_config(path: Path, overrides: Sequence[str] = ()) -> GeneralistConfig:
    """Like `load_config`, for a family of tasks."""
    return load_as(GeneralistConfig, path, overrides)


def packaged_configs() -> dict[str, Path]:
    """The configs that come with autoprune, by name."""
    return {path.stem: path for path in sorted(PACKAGED.glob("*.toml"))}


def _read_toml(path: Path) -> dict[str, Any]:
    packaged, run = packaged_configs(), (path / "config.json").exists()
    if not run and not path.is_file():
        path = packaged.get(str(path), path)
    if path.is_dir():
        taken = f" that it was made with, and --run-dir {path}" if run else ", a TOML file such as configs/digits.toml"
        raise ConfigError(f"{path} is {'the directory of a run' if run else 'a folder'}: give the config{taken}.")
    if not path.exists():
        raise FileError(
            f"the config not found: {path}. Give the path of a TOML file, or the name of a config that comes with "
            f"autoprune. {did_you_mean(path.stem, packaged)}"
        )
    text = read_text(path, "the config")
    try:
        return parse_toml(text)
    except FileError as error:
        raise ConfigError(f"the config {path} cannot be used: {error}.") from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides such as ``search.episodes=50`` as nested plain data."""
    return _with_overrides({}, overrides)


def parse_config(data: Mapping[str, Any], where: str) -> Config:
    """Validates plain data; raises ConfigError that names the key, what was given and what is allowed."""
    return _validated(Config, data, where)


Kind = TypeVar("Kind", bound=Root)


def _with_defaults(kind: type[Root], data: Mapping[str, Any]) -> dict[str, Any]:
    """The data, with what this kind of config sets in a section otherwise than the section itself does.

    So a table that changes one key of a section keeps the others as they are without that table.
    """
    kept = {
        name: {**field.default.model_dump(mode="json", exclude_defaults=True), **data[name]}
        for name, field in kind.model_fields.items()
        if isinstance(field.default, Section) and isinstance(data.get(name), dict)
    }
    return _on_device(_by_precision({**data, **kept})) if kind is Config else _by_precision({**data, **kept})


def _by_precision(data: dict[str, Any]) -> dict[str, Any]:
    """The data, with what suits int8 layers where it says nothing else.

    They read four neighbouring inputs at once: groups of 8 that keep such quads are as fast at 50% as others at 75%.
    Where layers choose, all of them do: one that is left whole is in float32, among others that are not.
    """
    env, precision = data.get("env", {}), data.get("precision", "float32")
    if precision == "float32" or not isinstance(env, dict):
        return data
    offered = {"min_saving": 0.0} if precision == "planned" else {}
    return {**data, "env": {"pattern": {"name": "group", "size": 8, "block": 4}, **offered, **env}}


def _on_device(data: dict[str, Any]) -> dict[str, Any]:
    """The data, with a speed-up that is over the dense model repacked, where no dense engine runs on the device."""
    device, target = data.get("device", HERE), data.get("target", {"speedup": 2.0})
    name = device.get("name") if isinstance(device, dict) else device
    if name == HERE or not isinstance(target, dict) or target.get("over", "best") != "best":
        return data
    return {**data, "target": {**target, "over": "repacked"}}


def _validated(kind: type[Kind], data: Mapping[str, Any], where: str) -> Kind:
    try:
        return kind.model_validate_json(
            json.dumps(_with_defaults(kind, data))
        )  # JSON mode: lists for tuples, and no other leniency
    except ValidationError as error:
        raise ConfigError(f"{where}: " + " ".join(_explain(kind, item) for item in error.errors()[:5])) from None
    except RecursionError:
        raise ConfigError(f"{where}: it is nested more than {DEPTH} deep, and no key of a config is.") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: only numbers, strings, booleans, lists and tables can be used ({error})."
        ) from None


def _with_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    if any(override.partition("=")[0].strip().partition(".")[0] == "target" for override in overrides):
        data.pop("target", None)  # what is asked for now takes the place of what the file asks for
    for override in overrides:
        _apply_override_(data, override)
    return data


def _apply_override_(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes KEY=VALUE, e.g. --set search.episodes=50, not {override!r}.")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except FileError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    if len(parents) >= DEPTH:
        raise ConfigError(f"--set takes a key of at most {DEPTH} parts, not of {len(parents) + 1}: {key[:40]}...")
    table = data
    for parent in parents:
        inner = table.setdefault(parent, {})
        if isinstance(inner, str):  # task = "digits" with --set task.widths=[8,16]
            inner = table[parent] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a table.")
        table = inner
    table[last] = value


def _explain(kind: type[BaseModel], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key, given = ".".join(path), item.get("input")
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}. {did_you_mean(path[-1], _keys_at(kind, path[:-1]))}"
    if item["type"] == "missing":
        return f"the key {key!r} is missing."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = f" (given: {reprlib.repr(given)})" if not isinstance(given, dict) else ""
    return f"{key or 'the config'}: {message[0].lower()}{message[1:]}{shown}.".replace("..", ".")


def _keys_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys allowed in the table at `path`."""
    table: Any = kind
    for part in path:
        annotation = table.model_fields[part].annotation if hasattr(table, "model_fields") else table
        table = next(
            (kind for kind in get_args(annotation) if isinstance(kind, type) and kind is not type(None)), annotation
        )
    fields = table.model_fields if hasattr(table, "model_fields") else table.__dataclass_fields__
    return list(fields)


def check_directory(directory: Path, resolved: Mapping[str, Any]) -> None:
    """Raises ConfigError when `directory` holds the run of another config, or is no directory; writes nothing."""
    path = directory / "config.json"
    if path.exists():
        changed = _changed_keys(read_json(path, "the run's config", by_hand=True), resolved)
        if changed:
            raise ConfigError(
                f"{directory} holds a run of another config; these keys differ: {', '.join(changed)}. Nothing "
                "was changed. Use another --run-dir, give the same config, or delete that directory."
            )
    elif directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file: give a run directory, or a name that is free.")


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, ``section.key`` by ``section.key``."""
    flattened: dict[str, Any] = {}
    for key, value in data.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = flat(before), flat(now)
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
