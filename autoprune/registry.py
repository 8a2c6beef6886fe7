"""Registries: a name in a config or a plan -> the class it stands for, imported when first asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar, cast

from autoprune.errors import ConfigError, did_you_mean

Member = TypeVar("Member")


@dataclass(frozen=True)
class Choice:
    """A registry row and its arguments, e.g. ``Choice("group", {"size": 8})``.

    ``args`` holds JSON values only, so that a choice survives a file.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        inside = ",".join(f"{key}={value}" for key, value in sorted(self.args.items()))
        return f"{self.name}({inside})" if inside else self.name

    def __hash__(self) -> int:
        return hash(self._text)

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | Choice) -> Choice:
        """The choice that a name, or a table with a ``name`` and its arguments, stands for."""
        if isinstance(given, Choice):
            return given
        if isinstance(given, Mapping):
            return cls(str(given.get("name")), {key: value for key, value in given.items() if key != "name"})
        return cls(str(given))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "args": dict(self.args)}

    @classmethod
    def from_json(cls, data: Any) -> Choice:
        """Raises ConfigError when `data` is not ``{"name": str, "args": {...}}``."""
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise ConfigError(f"a choice must be an object with a 'name' and 'args', not {data!r}.")
        args = data.get("args", {})
        if not isinstance(args, dict) or set(data) - {"name", "args"}:
            raise ConfigError(f"a choice holds 'name' and 'args' (an object) only, not {data!r}.")
        return cls(data["name"], args)


class Registry(Generic[Member]):
    """One family of interchangeable classes. A new member is one new file and one row.

    Rows are ``name -> "module:Class"``; modules are imported lazily, so optional dependencies
    cost nothing until they are used.
    """

    def __init__(self, kind: str, rows: Mapping[str, str]) -> None:
        self.kind = kind
        self._rows = dict(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def get(self, name: str) -> type[Member]:
        """Returns the class called `name`; raises ConfigError with the nearest name on a miss."""
        if name not in self._rows:
            raise ConfigError(f"unknown {self.kind} {name!r}. {did_you_mean(name, self._rows)}")
        module, _, attribute = self._rows[name].partition(":")
        return cast("type[Member]", getattr(importlib.import_module(module), attribute))

    def create(self, choice: Choice) -> Member:
        """Builds the member a choice names; raises ConfigError on unknown or missing arguments."""
        member = self.get(choice.name)
        signature = inspect.signature(member)
        allowed = [name for name in signature.parameters if name != "self"]
        for key in choice.args:
            if key not in allowed:
                hint = did_you_mean(key, allowed) if allowed else "It takes no arguments."
                raise ConfigError(f"{self.kind} {choice.name!r} has no argument {key!r}. {hint}")
        try:
            signature.bind(**choice.args)
        except TypeError as error:
            raise ConfigError(f"{self.kind} {choice.name!r}: {error}.") from None
        return member(**choice.args)
