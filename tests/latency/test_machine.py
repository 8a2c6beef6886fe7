"""The machine's identity is plain JSON, and every difference is told."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.latency.machine import _cpu_model, differences, machine_identity

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
IDENTITIES = st.dictionaries(st.text(max_size=5), VALUES, max_size=5)


def test_the_identity_survives_json_and_equals_itself() -> None:
    here = machine_identity()
    assert json.loads(json.dumps(here)) == here
    assert differences(here, machine_identity()) == []
    assert here["cpu"]
    assert here["torch"] == torch.__version__


def test_a_difference_names_both_sides() -> None:
    there = {**machine_identity(), "cpu": "Pentium"}
    del there["vector"]
    told = differences(there, machine_identity())
    assert len(told) == 2
    assert told[0].startswith("cpu was 'Pentium', here it is '")
    assert told[1].startswith("vector was not recorded, here it is '")


def test_a_tuple_equals_the_list_it_became_in_a_file() -> None:
    assert differences({"shape": [1, 2]}, {"shape": (1, 2)}) == []


@given(IDENTITIES, IDENTITIES)
def test_no_difference_is_equality(a: dict[str, object], b: dict[str, object]) -> None:
    assert differences(a, a) == []
    changed = differences(a, b)
    assert len(changed) == len(differences(b, a))
    assert bool(changed) == (json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True))


def test_the_cpu_model_is_read_where_linux_keeps_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3GHz\n")
    assert _cpu_model(cpuinfo) == "Some CPU @ 3GHz"
    assert _cpu_model(tmp_path / "none")
