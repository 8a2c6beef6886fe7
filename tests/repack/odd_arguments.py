"""Calls every operator that a graph may hold with odd arguments; says first which, so that the last one is to blame.

``python odd_arguments.py SEED CALLS``: so many calls of each.
"""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from autoprune.repack.graph import aten
from autoprune.repack.graph.allowed import fault, is_allowed

TYPES = [torch.float32, torch.float32, torch.int64, torch.bool, torch.int32, torch.uint8, torch.float64, torch.float16]
FLOATS = [0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
INTEGERS = [100, -7, 2**31 - 1, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]
TEXTS = ["", "mean", "linear", "reflect", "constant", "sum", "trunc", "floor", "same", "left", "ij,jk->ik", "tanh"]
LARGEST = 2**20  # elements of a result, or parts of one


def allowed() -> list[str]:
    found = []
    for schema in torch._C._jit_get_all_schemas():
        packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None) if "aten::" in schema.name else None
        for overload in packet.overloads() if packet is not None else ():
            if is_allowed(getattr(packet, overload)):
                found.append(str(getattr(packet, overload)))
    return sorted(set(found))


class Odd:
    """Draws arguments."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)

    def tensor(self) -> Tensor:
        shape = [self.rng.choice([0, 1, 1, 2, 2, 3, 4, 5]) for _ in range(self.rng.choice([0, 1, 1, 2, 2, 3, 4, 5]))]
        dtype, odd = self.rng.choice(TYPES), self.rng.random() < 0.25
        made = torch.randn(shape).mul(3).to(dtype)
        if odd and made.numel() and dtype != torch.bool:
            limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
            extremes = FLOATS[6:] if dtype.is_floating_point else [limits.min, limits.max]
            made.flatten()[self.rng.randrange(made.numel())] = self.rng.choice(extremes)
        return made

    def integer(self) -> int:
        return self.rng.choice([0, 1, 1, 2, 2, 3, -1, -2, 4] if self.rng.random() < 0.85 else INTEGERS)

    def value(self, kind: str) -> Any:
        if kind.startswith("Optional["):
            return None if self.rng.random() < 0.3 else self.value(kind[9:-1])
        if kind.startswith("List["):
            return [self.value(kind[5:-1]) for _ in range(self.rng.choice([0, 1, 1, 2, 2, 3, 4]))]
        if kind == "number":
            return self.rng.choice([self.integer(), self.rng.choice(FLOATS), True])
        made = {"Tensor": self.tensor, "int": self.integer, "SymInt": self.integer}.get(kind)
        if made is not None:
            return made()
        some: dict[str, list[Any]] = {"float": FLOATS, "bool": [True, False], "str": TEXTS, "ScalarType": TYPES}
        return self.rng.choice(some[kind])

    def arguments(self, operator: torch._ops.OpOverload) -> dict[str, Any]:
        given = {}
        for argument in operator._schema.arguments:
            kind = str(argument.real_type if "ScalarType" in str(argument.real_type) else argument.type)
            nowhere = any(each in str(argument.real_type) for each in aten._ENUMERATED)
            if not nowhere and not (argument.has_default_value() and self.rng.random() < 0.4):
                given[argument.name] = self.value(kind)
        return given


def on_meta(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return [*map(on_meta, value)] if isinstance(value, list) else {key: on_meta(x) for key, x in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def call(name: str, given: dict[str, Any]) -> bool:
    """As a file's operations are: on the meta device first, which tells what they ask for."""
    operator = aten.resolve(name)
    takes_device = any(argument.name == "device" for argument in operator._schema.arguments)
    masked = name == "aten.index.Tensor" and any(map(aten.is_mask, given["indices"]))
    if fault(name, given) or masked or given.get("sections", 0) > LARGEST:
        return False
    try:
        made = operator(**on_meta(given), **({"device": "meta"} if takes_device else {}))
        tensors = [each for each in (made if isinstance(made, (list, tuple)) else [made]) if isinstance(each, Tensor)]
        if sum(each.numel() for each in tensors) > LARGEST:
            return False
        operator(**given, **({"device": "cpu"} if takes_device else {}))
    except aten.FAILURES:
        return False
    return True


def main(seed: int, calls: int) -> None:
    warnings.simplefilter("ignore")
    odd, went = Odd(seed), 0
    for name in allowed():
        for _ in range(calls):
            given = odd.arguments(aten.resolve(name))
            print(name, str(given)[:200], flush=True)
            went += call(name, given)
    print(went)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
