"""Configs: every shipped one is valid; a wrong key, type or value is an error that names the nearest key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from autoprune.agents import AGENTS
from autoprune.config import (
    Config,
    GeneralistConfig,
    Section,
    _validated,
    has_table,
    load_as,
    load_config,
    load_generalist_config,
    packaged_configs,
    parse_config,
    parse_overrides,
)
from autoprune.envs.actions import ACTIONS
from autoprune.errors import ConfigError, FileError
from autoprune.pipeline.choices import create_choices
from autoprune.pipeline.steering import SteeringConfig
from autoprune.registry import Choice
from autoprune.training.recipes import CONVOLUTIONAL, SEQUENTIAL, recipe_for

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
GENERALISTS = [path for path in SHIPPED if has_table(path, "family")]
STEERING = [path for path in SHIPPED if has_table(path, "steering")]
CONFIGS = [path for path in SHIPPED if path not in (*GENERALISTS, *STEERING)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_json(path: Path) -> None:
    config = load_config(path)
    create_choices(config)
    assert parse_config(config.to_json(), "again") == config


@pytest.mark.parametrize("path", GENERALISTS, ids=lambda path: path.stem)
def test_shipped_configs_of_families_are_valid_and_no_other_command_s(path: Path) -> None:
    config = load_generalist_config(path)
    for choice in config.env.actions:
        ACTIONS.create(choice)
    AGENTS.create(config.agent)
    assert GeneralistConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ConfigError, match="autoprune train"):
        load_config(path)


@pytest.mark.parametrize("path", STEERING, ids=lambda path: path.stem)
def test_shipped_configs_of_steering_are_valid_and_no_other_command_s(path: Path) -> None:
    config = load_as(SteeringConfig, path)
    assert AGENTS.create(config.agent).arguments()["net"]  # type: ignore[attr-defined]
    assert SteeringConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ConfigError, match="autoprune train"):
        load_config(path)


def test_there_are_shipped_configs() -> None:
    assert {"digits", "fashion_mnist"} <= {path.stem for path in CONFIGS}
    assert {path.stem for path in GENERALISTS} == {"generalist"}
    assert {path.stem for path in STEERING} == {"steering"}


def test_a_config_that_comes_along_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(packaged_configs()) == [path.stem for path in SHIPPED]
    for path in CONFIGS:
        assert load_config(Path(path.stem)) == load_config(path)
    for path in GENERALISTS:
        assert has_table(Path(path.stem), "family")
        assert load_generalist_config(Path(path.stem)) == load_generalist_config(path)
    Path("digits").mkdir()
    assert load_config(Path("digits")) == load_config(CONFIGS[0]), "a folder of that name is no config"
    Path("digits/config.json").touch()
    with pytest.raises(ConfigError, match="digits is the directory of a run: give the config that it was made with"):
        load_config(Path("digits"))
    Path("digits/config.json").unlink()
    Path("digits").rmdir()
    Path("digits").write_text('task = "mnist"\n')
    assert load_config(Path("digits")).task == Choice("mnist"), "a file of that name comes first"


@pytest.mark.parametrize("name", ["digit", "configs/digit.toml"])
def test_an_unknown_config_lists_those_that_come_along(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    allowed = ", ".join(path.stem for path in SHIPPED)
    with pytest.raises(FileError, match=rf"not found: {name}\..*Did you mean 'digits'\? Allowed: {allowed}\."):
        load_config(Path(name))


WRONG = [
    ({"serch": {}}, "unknown key 'serch'. Did you mean 'search'"),
    ({"search": {"episods": 5}}, "Did you mean 'episodes'"),
    ({"finetune": {"settings": {"momentm": 0.5}}}, "Did you mean 'momentum'"),
    ({"target": {"sped": 2.0}}, "Did you mean 'speedup'"),
    ({"search": {"episodes": "5"}}, "search.episodes: .*valid integer.*'5'"),
    ({"search": {"episodes": 0}}, "greater than or equal to 1"),
    ({"env": {"max_sparsity": 1.5}}, "less than 1"),
    ({"target": {}}, "at least one"),
    ({"target": {"speedup": 0.5}}, "above 1"),
    ({"dense": {"epochs": 0}}, "epochs"),
    ({"task": 5}, "must be a name"),
    ({"env": {"actions": [{"sizes": [4]}]}}, "must be a name"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_config_is_one_clear_error(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_config({"task": "digits", **change}, "x.toml")


def test_a_missing_task_is_said() -> None:
    with pytest.raises(ConfigError, match="'task' is missing"):
        parse_config({}, "x.toml")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": "digit"}, "unknown task 'digit'. Did you mean 'digits'"),
        ({"search": {"agent": "pp0"}}, "Did you mean 'ppo'"),
        ({"search": {"agent": {"name": "ppo", "net_size": 3}}}, "no argument 'net_size'"),
        ({"env": {"pattern": {"name": "group", "size": 0}}}, "1 to 1024"),
        ({"env": {"recovery": "batchnorm"}}, "Did you mean 'batch_norm'"),
        ({"env": {"actions": ["sparsity", "learning_rate"]}}, "would never reach the reward"),
        ({"latency": {"engines": ["onnx"]}}, "unknown dense engine 'onnx'"),
    ],
)
def test_names_are_checked_before_any_work(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        create_choices(parse_config({"task": "digits", **change}, "x.toml"))


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('task = "digits"\n[search]\nepisodes = 3\n')
    config = load_config(
        path, ["search.episodes=50", "search.agent=sac", "task.widths=[8, 16]", "env.recovery={name='train', steps=3}"]
    )
    assert config.search.episodes == 50
    assert config.search.agent == Choice("sac")
    assert config.task == Choice("digits", {"widths": [8, 16]})
    assert config.env.recovery == Choice("train", {"steps": 3})
    assert parse_overrides(["a.b=1"]) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "text"),
    [("search.episodes", "KEY=VALUE"), ("seed.x=1", "not a table"), ("search.episods=1", "Did you mean 'episodes'")],
)
def test_a_wrong_override_is_one_clear_error(tmp_path: Path, override: str, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text('task = "digits"\nseed = 1\n')
    with pytest.raises(ConfigError, match=text):
        load_config(path, [override])


def test_a_missing_or_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not found"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("task = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_defaults_are_those_of_the_class() -> None:
    assert parse_config({"task": "digits"}, "x") == Config(task=Choice("digits"))


@pytest.mark.parametrize("kind", [Config, GeneralistConfig])
def test_a_table_that_changes_one_key_keeps_the_others_of_its_section(
    kind: type[Config] | type[GeneralistConfig],
) -> None:
    base: dict[str, object] = {"task": "digits"} if kind is Config else {"family": {}}
    whole = _validated(kind, base, "x.toml")
    for name, field in kind.model_fields.items():
        if not isinstance(field.default, Section):
            continue
        for key, value in getattr(whole, name).model_dump(mode="json").items():
            changed = _validated(kind, {**base, name: {key: value}}, "x.toml")
            assert getattr(changed, name) == getattr(whole, name), f"{name}.{key}"


def test_settings_that_are_changed_keep_the_recipe_for_the_model() -> None:
    convolutional, sequential = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    changes = parse_config({"task": "digits", "finetune": {"settings": {"epochs": 4}}}, "x.toml").finetune.settings
    for model, recipe in ((convolutional, CONVOLUTIONAL), (sequential, SEQUENTIAL), (nn.LSTM(3, 4), SEQUENTIAL)):
        assert recipe_for(model).changed(changes) == replace(recipe, epochs=4)


def test_int8_layers_keep_four_neighbouring_inputs_unless_another_pattern_is_named() -> None:
    quads = Choice("group", {"size": 8, "block": 4})
    for given in ({}, {"env": {"max_sparsity": 0.9}}):
        for precision in ("int8", "mixed", "planned"):
            config = parse_config({"task": "digits", "precision": precision, **given}, "here")
            assert config.env.pattern == quads
            assert config.env.min_saving == (0.0 if precision == "planned" else 0.02)
            assert parse_config(config.to_json(), "again") == config
    named = {"task": "digits", "precision": "int8", "env": {"pattern": "unstructured"}}
    assert parse_config(named, "here").env.pattern == Choice("unstructured")
    assert parse_config({"task": "digits"}, "here").env.pattern == Choice("group", {"size": 8})
    with pytest.raises(ConfigError, match=r"precision: .*'float32', 'int8', 'mixed' or 'planned'"):
        parse_config({"task": "digits", "precision": "int4"}, "here")
