"""What stands for a named tuple, a dataclass or a model's own output class, once only data is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Record(tuple[Any, ...]):
    """Values with names: ``out.logits``, ``out["logits"]``, ``out[0]`` and ``logits, *rest = out`` all work."""

    def __new__(cls, values: Mapping[str, Any]) -> Record:
        made = super().__new__(cls, values.values())
        made.__dict__.update(values)
        return made

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this record has {', '.join(vars(self))}, not {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return vars(self)[key] if isinstance(key, str) else super().__getitem__(key)

    def keys(self) -> tuple[str, ...]:
        """The names."""
        return tuple(vars(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, (dict(vars(self)),)

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
