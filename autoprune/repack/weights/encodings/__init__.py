"""How a file tells which weights are kept: the rows of ENCODINGS, and the choice of the smallest."""

from __future__ import annotations

from autoprune.registry import Choice, Registry
from autoprune.repack.weights.encodings.base import Cells, Encoding

__all__ = ["CANDIDATES", "ENCODINGS", "Cells", "Encoding", "smallest"]

ENCODINGS: Registry[Encoding] = Registry(
    "encoding",
    {
        "full": "autoprune.repack.weights.encodings.full:Full",
        "bitmask": "autoprune.repack.weights.encodings.bitmask:Bitmask",
        "csr": "autoprune.repack.weights.encodings.csr:Csr",
        "relative": "autoprune.repack.weights.encodings.relative:Relative",
    },
)
CANDIDATES = (  # of equally small ones the first is taken, which decodes fastest
    Choice("full"),
    Choice("csr"),
    Choice("bitmask"),
    Choice("relative", {"bits": 8}),
    Choice("relative", {"bits": 4}),
)


def smallest(cells: Cells) -> Choice:
    """The candidate that takes the fewest bytes."""
    sizes = {choice: ENCODINGS.create(choice).bits(cells) for choice in CANDIDATES}
    fitting = {choice: -(-bits // 8) for choice, bits in sizes.items() if bits is not None}
    return min(fitting, key=lambda choice: fitting[choice])
