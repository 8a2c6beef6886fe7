"""Plans survive JSON; a corrupt one says where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.plan import LayerPlan, Plan
from autoprune.precision import OF_LAYERS
from autoprune.registry import Choice

choices = st.builds(Choice, st.text(min_size=1), st.dictionaries(st.text(), st.integers() | st.booleans() | st.text()))
layers = st.builds(LayerPlan, st.floats(0, 0.99), choices, choices, st.sampled_from(OF_LAYERS))
plans = st.builds(Plan, st.dictionaries(st.text(), layers), choices, st.dictionaries(st.text(), st.floats(0, 1)))


@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.key == plan.key


def good() -> dict[str, object]:
    return Plan({"a": LayerPlan(0.5, Choice("group", {"size": 8}))}).to_json()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 99}, "version 1, not 99"),
        ({"layers": []}, "must be an object"),
        ({"extra": 1}, "extra"),
        ({"layers": {"a": {"sparsity": 0.5}}}, "'a'"),
        ({"layers": {"a": {"sparsity": 1.5, "pattern": {"name": "x"}, "criterion": {"name": "y"}}}}, r"\[0, 1\)"),
        ({"layers": {"a": {"sparsity": "x", "pattern": {"name": "x"}, "criterion": {"name": "y"}}}}, "number"),
        (
            {
                "layers": {
                    "a": {"sparsity": 0, "pattern": {"name": "x"}, "criterion": {"name": "y"}, "precision": "int4"}
                }
            },
            "one of float32, int8, not 'int4'",
        ),
        ({"training": "one_shot"}, "a choice must be"),
        ({"settings": {"learning_rate": "high"}}, "numbers"),
    ],
)
def test_a_corrupt_plan_says_where(tmp_path: Path, change: dict[str, object], text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**good(), **change}))
    with pytest.raises(FileError, match=text):
        Plan.load(path)


def test_saving_and_loading_gives_the_same_plan(tmp_path: Path) -> None:
    plan = Plan.from_json(good())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense"])
def test_a_file_that_is_no_plan_is_a_file_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FileError, match="corrupt"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not found"):
        Plan.load(tmp_path / "plan.json")


def test_a_layer_the_model_lacks_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'conv1'"):
        Plan({"conv_1": LayerPlan(0.5, Choice("group"))}).check_layers(["conv1", "fc"])


def test_errors_share_one_base() -> None:
    assert issubclass(FileError, AutopruneError)


def test_a_plan_in_float32_is_written_as_it_was_before_layers_had_precisions() -> None:
    layer = {
        "sparsity": 0.5,
        "pattern": {"name": "group", "args": {"size": 8}},
        "criterion": {"name": "magnitude", "args": {}},
    }
    plain = Plan({"a": LayerPlan(0.5, Choice("group", {"size": 8}))})
    assert plain.to_json()["layers"] == {"a": layer}
    in_bytes = plain.with_precisions({"a": "int8"})
    assert in_bytes.to_json()["layers"] == {"a": {**layer, "precision": "int8"}}
    assert in_bytes.key != plain.key


def test_what_a_plan_s_model_is_repacked_in() -> None:
    plain = Plan(dict.fromkeys("ab", LayerPlan(0.5, Choice("unstructured"))))
    mixed = plain.with_precisions({"b": "int8"})
    assert mixed.precision_in("planned") == {"b": "int8"}
    assert plain.precision_in("planned") == "float32"
    assert mixed.precision_in("int8") == "int8"
