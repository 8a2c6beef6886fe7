"""Patterns: which masks are allowed. One file and one row a pattern."""

from autoprune.patterns.base import Pattern
from autoprune.registry import Registry

PATTERNS: Registry[Pattern] = Registry(
    "pattern",
    {
        "unstructured": "autoprune.patterns.unstructured:Unstructured",
        "group": "autoprune.patterns.group:Group",
        "n:m": "autoprune.patterns.n_of_m:NOfM",
        "block": "autoprune.patterns.block:Block",
        "channel": "autoprune.patterns.channel:Channel",
        "filter": "autoprune.patterns.filter:Filter",
    },
)

__all__ = ["PATTERNS", "Pattern"]
