"""What callbacks say where their trainer is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from autoprune.errors import MissingExtra


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_trainer_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"autoprune.integrations.{name}", raising=False)
    with pytest.raises(MissingExtra, match=rf'needs {name}: pip install "autoprune\[{name}\]"'):
        importlib.import_module(f"autoprune.integrations.{name}")
