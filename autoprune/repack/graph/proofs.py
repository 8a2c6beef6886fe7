"""Which extents of a captured graph are free: what torch.export believes, tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from autoprune.repack.graph.extents import choose, examples, holds, value_of
from autoprune.repack.graph.ir import Graph

Right = Callable[[Mapping[int, int]], bool]
"""Extents, those of the examples where none are given -> whether the program computes there what the model does."""

BATCHES, NEAR = 66, 64  # how far to look for an extent that the conditions allow


def proven(graph: Graph, right: Right) -> Graph:
    """The graph of a program with those extents free that prove to be; the others are the examples'."""
    own = examples(graph.inputs)
    other = _others(graph, own)
    same: dict[int, int] = {}  # number -> the one of an extent that it only varies with
    if other and not right(other):
        alone = {number for number, extent in other.items() if len(other) > 1 and right({number: extent})}
        same = _together(graph, own, {n: extent for n, extent in other.items() if n not in alone}, right)
        kept = {**{number: number for number in alone}, **same}
        other = {number: other[root] for number, root in kept.items()}
        if other and not right(other):
            other = {number: extent for number, extent in other.items() if kept[number] == 0}
    least = []
    for root in sorted({same.get(number, number) for number in other}):
        single = {number: 1 for number in other if same.get(number, number) == root}
        if own[root] > 1 and _allowed(graph, {**own, **single}) and not right(single):
            least.append(["le", 2, {"extent": root}])
    terms = {n: {"extent": same.get(n, n)} if n in other else extent for n, extent in own.items()}
    conditions = (_rewritten(each, terms) for each in (*graph.conditions, *least))
    inputs = []
    for each in graph.inputs:
        free = [None if number not in other else same.get(number, number) for number in each.free]
        while free and free[-1] is None:
            free.pop()
        inputs.append(replace(each, free=tuple(free)))
    return replace(graph, inputs=tuple(inputs), conditions=tuple(each for each in conditions if isinstance(each, list)))


def _allowed(graph: Graph, extents: Mapping[int, int]) -> bool:
    return all(holds(condition, extents) for condition in graph.conditions)


def _others(graph: Graph, own: Mapping[int, int]) -> dict[int, int]:
    """Another extent for each number that the graph believes free: small batches, else about the examples' work."""
    taken = {extent for each in graph.inputs for extent in each.shape}

    def candidates(number: int) -> Iterable[int]:
        larger = range(2, BATCHES) if number == 0 else range(own[number] + 1, own[number] + NEAR)
        return (*larger, *range(own[number] - 1, 0, -1))

    chosen = choose(own, graph.conditions, candidates, taken)
    return {number: extent for number, extent in chosen.items() if extent != own[number]}


def _together(graph: Graph, own: Mapping[int, int], failed: Mapping[int, int], right: Right) -> dict[int, int]:
    """Extents that are equal in the examples and vary together alone -> the first of them: export did not see it."""
    found: dict[int, int] = {}
    for extent in sorted({own[number] for number in failed}):
        group = sorted(number for number in failed if own[number] == extent)
        changed = dict.fromkeys(group, failed[group[0]])
        if len(group) > 1 and _allowed(graph, {**own, **changed}) and right(changed):
            found |= dict.fromkeys(group, group[0])
    return found


def _rewritten(condition: Any, terms: Mapping[int, Any]) -> Any:
    """A condition with other terms for its extents; a number where all are known."""
    if isinstance(condition, dict):
        return terms[condition["extent"]]
    if isinstance(condition, int):
        return condition
    name, *operands = condition
    inside = [name, *(_rewritten(each, terms) for each in operands)]
    return inside if any(isinstance(each, (list, dict)) for each in inside) else value_of(inside, {})
