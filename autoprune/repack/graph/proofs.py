"""Which extents of a captured graph are free: what torch.export believes, tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from autoprune.repack.graph.extents import choose, examples, holds, numbers_in, value_of
from autoprune.repack.graph.ir import Graph

Right = Callable[[Mapping[int, int]], bool]
"""Extents, those of the examples where none are given -> whether the program computes there what the model does."""

BATCHES, NEAR = 66, 64  # how far to look for an extent that the conditions allow
TRIES = 8  # of extents beyond conditions that torch asks and the model may not


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
    rewritten = (_rewritten(each, terms) for each in (*graph.conditions, *least))
    conditions = [each for each in rewritten if isinstance(each, list)]
    members = {number: [each for each in other if same.get(each, each) == number] for number in other}

    def right_at(chosen: Mapping[int, int]) -> bool:
        return right({each: extent for number, extent in chosen.items() for each in members[number]})

    inputs = []
    for each in graph.inputs:
        free = [None if number not in other else same.get(number, number) for number in each.free]
        while free and free[-1] is None:
            free.pop()
        inputs.append(replace(each, free=tuple(free)))
    return replace(graph, inputs=tuple(inputs), conditions=tuple(_asked(conditions, own, right_at)))


def _asked(conditions: Sequence[Any], own: Mapping[int, int], right: Right) -> Iterator[Any]:
    """The conditions without those that torch asks alone.

    It tells extents apart (``ne``) to know how memory lies, which the program finds out anew at each call: where the
    model's result is right at the smallest extents that such a condition forbids, the model does not ask for it.

    Args:
        conditions: on the extents.
        own: the examples' extents.
        right: whether the program is.
    """
    kept = [each for each in conditions if each[0] != "ne"]
    tried: dict[tuple[tuple[int, int], ...], bool] = {}

    def fine(chosen: Mapping[int, int]) -> bool:
        key = tuple(chosen.items())
        if key not in tried:
            tried[key] = len(tried) < TRIES and right(chosen)
        return tried[key]

    def forbidden(condition: Any, numbers: Iterable[int], extents: Iterable[int]) -> Iterator[dict[int, int]]:
        for extent in extents:
            chosen = dict.fromkeys(numbers, extent)
            every = {**own, **chosen}
            if not holds(condition, every) and all(holds(each, every) for each in kept):
                yield chosen

    small, empty = range(1, max(own.values(), default=0) + NEAR), set()
    for condition in conditions:
        if condition[0] != "ne":
            yield condition
            continue
        numbers = sorted(numbers_in(condition))
        alone = [chosen for number in numbers for chosen in islice(forbidden(condition, [number], small), 2)]
        some = alone or list(islice(forbidden(condition, numbers, small), 2))
        none = [chosen for number in numbers for chosen in forbidden(condition, [number], [0])]
        if (some or none) and all(map(fine, some)):
            empty |= {number for chosen in none if not fine(chosen) for number in chosen}
        else:
            yield condition
    for number in sorted(empty):
        yield ["le", 1, {"extent": number}]


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
