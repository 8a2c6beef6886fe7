"""Lifting of einsum: a product of matrices between permutations, where it is one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autoprune.repack.graph.ops import Op, TorchOp
from autoprune.repack.graph.site import Result, Site

_TWO = re.compile(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]*)")


def einsum(site: Site) -> Result:
    """Two operands that share one index which is summed; what else they share is of a batch."""
    found = _TWO.fullmatch(site.args["equation"].replace(" ", ""))
    tensors = site.args["tensors"]
    if found is None or not all(site.is_float(node, None) for node in tensors):
        return None
    left, right, out = found.groups()
    shared = [each for each in left if each in right]
    batch = [each for each in shared if each in out]
    (summed, rows, columns) = (
        [each for each in letters if each not in batch]
        for letters in (shared, [x for x in left if x not in shared], [x for x in right if x not in shared])
    )
    known = sorted([*batch, *rows, *columns]) == sorted(out) and len(set(left)) == len(left)
    if not known or len(set(right)) < len(right) or (len(summed), len(rows), len(columns)) != (1, 1, 1):
        return None
    extents = [
        node.meta["val"].shape[letters.index(summed[0])] for node, letters in zip(tensors, (left, right), strict=True)
    ]
    if extents[0] != extents[1]:
        return None  # one of them is 1, and repeated
    made: list[Op] = []

    def permuted(name: str, given: str, letters: Sequence[str], order: Sequence[str]) -> str:
        if list(letters) == list(order):
            return given
        axes = [letters.index(each) for each in order]
        made.append(TorchOp.of(name, "aten.permute.default", ({"ref": given}, axes)))
        return name

    name, ordered = site.output, [*batch, *rows, *columns]
    operands = [
        permuted(f"{name} operand {side}", site.context.names[node], letters, order)
        for side, (node, letters, order) in enumerate(
            zip(tensors, (left, right), ([*batch, *rows, *summed], [*batch, *summed, *columns]), strict=True)
        )
    ]
    product = name if ordered == list(out) else f"{name} product"
    made.append(TorchOp.of(product, "aten.matmul.default", tuple({"ref": each} for each in operands)))
    permuted(name, product, ordered, out)
    return tuple(made)
