"""What a repacked model's packed layers take on disk and fetch in an inference, a layer a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments
from autoprune.registry import Choice
from autoprune.repack.lowering.steps import NativeStep
from autoprune.repack.report import ProgramModel, RepackedModel
from autoprune.repack.runtime.program import shapes_of
from autoprune.repack.tuning.cache_model import MODELLED, Cache, Fetched, fetched
from autoprune.repack.weights.encodings import CANDIDATES, ENCODINGS
from autoprune.repack.weights.serialized import by_filter, by_group, store


@dataclass(frozen=True)
class LayerMemory:
    """One packed layer.

    Attributes:
        name: of the module it came from.
        sparsity: share of zeros.
        group_size: filters that share their kept positions, as packed.
        dense_bytes: of its float32 weight.
        stored_bytes: in a file, values of 32 bits.
        encoding: of its kept positions in a file; `shared`: told once a group of filters.
        shared: likewise.
        position_bits: encoding -> bits a nonzero weight, told once a filter and once a group; missing where the
            encoding cannot tell them.
        fetched: of one inference, by `cache_model`; None for a kind it does not know.
    """

    name: str
    sparsity: float
    group_size: int
    dense_bytes: int
    stored_bytes: int
    encoding: Choice
    shared: bool
    position_bits: dict[str, tuple[float | None, float | None]]
    fetched: Fetched | None


def layer_memory(fast: RepackedModel, example_inputs: Any, cache: Cache | None = None) -> tuple[LayerMemory, ...]:
    """A row a packed layer, in the order they run.

    Args:
        fast: what `repack` made.
        example_inputs: as given to `repack`; fetches hold for their shapes.
        cache: the level that is modelled; 32 KB of 8 ways when None.

    Raises:
        AutopruneError: `fast` is no program, or does not take these inputs.
    """
    if not isinstance(fast, ProgramModel):
        raise AutopruneError(f"only a program's memory can be told, not a {type(fast).__name__}'s: see its report.")
    given, program = Arguments.of(example_inputs), fast.program
    inputs = tuple(fast.signature.tensors(given.args, given.kwargs))
    with torch.inference_mode():
        fast(*inputs)  # says what is wrong with the inputs
    plan = program.plan(shapes_of(inputs))
    frame = plan.frame()
    plan.fill(frame, inputs)
    rows = []
    for step in plan.lowered.steps:
        if not isinstance(step, NativeStep) or step.layer is None:
            continue
        weights, tiling = program.weights[step.name], program.tilings[step.name]
        packed = weights.packed
        stored = store(packed)
        nonzero = max(1, int(np.count_nonzero(packed.values)))
        grids = by_filter(packed)[0], by_group(packed)[0]
        bits = {str(choice): [ENCODINGS.create(choice).bits(cells) for cells in grids] for choice in CANDIDATES}
        rows.append(
            LayerMemory(
                step.layer.layer or step.name,
                1.0 - nonzero / int(np.prod(packed.shape)),
                packed.group_size,
                4 * int(np.prod(packed.shape)),
                stored.bytes,
                Choice.from_json(stored.about["encoding"]),
                stored.about["shared"],
                {
                    name: (_share(one, nonzero), _share(shared, nonzero)) for name, (one, shared) in bits.items()
                },
                None if step.form not in MODELLED or packed.scale is not None or packed.in_bf16 else fetched(
                    step.build(weights, tiling), step.form, packed.group_size, program.target, frame.slots,
                    cache or Cache(),
                ),
            )
        )  # fmt: skip
    plan.release(frame)
    return tuple(rows)


def _share(bits: int | None, nonzero: int) -> float | None:
    return None if bits is None else bits / nonzero
