"""How a built model is laid out for one set of input shapes: its ops, its workspace, and what its functions return."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from autoprune.repack.aot.image import LINE, Image
from autoprune.repack.aot.interface import Port, Result
from autoprune.repack.kernels.compiler import Kernel
from autoprune.repack.lowering.layout import FLOAT_BYTES
from autoprune.repack.lowering.steps import Lowered
from autoprune.repack.native.sequence import LINE as COUNTER
from autoprune.version import __version__

HEAD = LINE  # bytes of a workspace before its counters: the call's mark, and how many parts have ended


class Status(IntEnum):
    """What the functions of a built model return; C knows them by these names."""

    OK = 0
    NULL_POINTER = 1
    MISALIGNED = 2
    NOT_PREPARED = 3
    OUT_OF_RANGE = 4
    WRONG_PART = 5
    WRONG_COUNT = 6
    WRONG_TYPE = 7
    WRONG_RANK = 8
    WRONG_SHAPE = 9
    TOO_SMALL = 10


@dataclass(frozen=True, eq=False)
class Call:
    """A model for one set of input shapes.

    Attributes:
        prefix: of its functions' names in C.
        lowered: its program; native throughout.
        ops: (kernel, where its fields lie in the image, items) of each, in order.
        constants: slot -> where its constant lies in the image.
        inputs: its parameters.
        outputs: its results.
        samples: that the program is run for, each by one thread; 1: it computes all there is at once.
        threads: the most that may work on one call.
    """

    prefix: str
    lowered: Lowered
    ops: tuple[tuple[Kernel, int, int], ...]
    constants: Mapping[int, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Result, ...]
    samples: int = 1
    threads: int = 1

    @property
    def ports(self) -> tuple[Port, ...]:
        """Inputs, then outputs."""
        return (*self.inputs, *(each.port for each in self.outputs))

    @property
    def shares_ops(self) -> bool:
        """Whether threads share the items of an op, not the samples of a call."""
        return self.threads > 1 and self.samples == 1

    @property
    def written_in_place(self) -> Mapping[int, int]:
        """Slot -> number of the output whose memory it is."""
        whole = [(number, each) for number, each in enumerate(self.outputs) if self.lowered.is_whole(each.name)]
        return {each.view.buffer.slot: number for number, each in whole}

    @property
    def own_results(self) -> Mapping[int, int]:
        """Slot of other results -> where it lies in a workspace, in bytes."""
        places, place = {}, self.arena_at + self.arena_bytes
        for slot, shape in self.lowered.outputs.items():
            if slot not in self.written_in_place:
                places[slot] = place
                place += _lines(int(np.prod(shape)) * FLOAT_BYTES)
        return places

    @property
    def counters_bytes(self) -> int:
        """Of a workspace: the counters that threads share."""
        return len(self.ops) * (self.threads + 1) * COUNTER * 8 if self.shares_ops else 0

    @property
    def arena_bytes(self) -> int:
        """Of an arena."""
        return _lines(self.lowered.arena.size * FLOAT_BYTES)

    @property
    def arenas(self) -> int:
        """In a workspace: one, or one for each thread that computes samples by itself."""
        return 1 if self.samples == 1 else self.threads

    @property
    def arena_at(self) -> int:
        """Where the first arena begins in a workspace."""
        return HEAD + _lines(self.counters_bytes)

    @property
    def workspace_bytes(self) -> int:
        """Memory that a call works in."""
        results = [
            place + _lines(int(np.prod(self.lowered.outputs[slot])) * FLOAT_BYTES)
            for slot, place in self.own_results.items()
        ]
        return max([self.arena_at + self.arenas * self.arena_bytes, *results])


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


def mark(call: Call, image: Image) -> int:
    """What a workspace begins with once it is prepared for a call.

    Another shape has other borders, and another build may have other sizes: neither takes such a workspace. Builds that
    differ in their kernels alone, such as in an activation, are told apart for wrappers, which compare marks.
    """
    kernels = [hashlib.sha256(kernel.assembly.encode()).digest() for kernel, *_ in call.ops]
    told = (
        __version__, call.prefix, call.workspace_bytes, call.inputs, call.lowered.arena.borders, image.digest, kernels,
    )  # fmt: skip
    return int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:8], "little") >> 1
