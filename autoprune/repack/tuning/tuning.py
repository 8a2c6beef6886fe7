"""Autotuning: how each packed layer is grouped and cut into items, found by running it where it will run.

Every candidate is timed in the program's own memory, on the layer's own input, in turns. What won is remembered for the
CPU, the shape and the sparsity, so the next model with such a layer starts at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoprune.documents import checksum_of, parse_json, without_checksum
from autoprune.errors import FileError
from autoprune.files import cache_folder, read_text, write_json
from autoprune.latency.machine import machine_identity
from autoprune.latency.quiet import timing
from autoprune.latency.timer import Clock
from autoprune.processes.locks import turn
from autoprune.repack.graph.ops import Conv2d, ConvolutionOp, GatedConv2d, Linear, Op, Recurrent
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import NativeStep
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.runtime.program import Plan, Program, shapes_of
from autoprune.repack.tuning.cache_model import Cache, fetched
from autoprune.repack.tuning.layer import WORTH_TRYING, Layer
from autoprune.repack.weights.grouping import GROUP_SIZES
from autoprune.repack.weights.quads import QUAD, WHOLE
from autoprune.repack.weights.serialized import flag

_LOG = logging.getLogger(__name__)
VERSION = 12  # of the kernels: what was tuned for others is not used
ROUNDS = 5
PANELS = ((96, 288), (192, 144), (192, 288), (192, 576))  # positions an item, inputs a panel
ITEMS_A_THREAD = 8  # so that threads finish together
UNSAVED_S = 1.0  # of timing, that a killed process may lose
STREAMED = 0.06  # bytes of a Linear's weight, read for few tokens, an operation of the whole model


class TuningCache:
    """What was found on this CPU, in one JSON file; a broken or foreign file is started anew."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        identity = machine_identity()
        self.machine = {key: identity[key] for key in ("cpu", "vector", "llvmlite")} | {
            "version": VERSION, "dot": host().dot, "tiles": host().amx,
        }  # fmt: skip
        self.found, self.by_sample, self.bf16_gains = self._read()
        self.changed = False

    def _read(self) -> tuple[dict[str, Tiling], dict[str, bool], dict[str, float]]:
        global _LAST
        try:
            text = read_text(self.path, "the tuning cache")
            if (last := _LAST) is None or last.text != text:
                last = _LAST = _Contents.of(text)
        except (FileError, KeyError, TypeError, AttributeError, ValueError):
            return {}, {}, {}
        if last.machine != self.machine:
            return {}, {}, {}
        return dict(last.found), dict(last.by_sample), dict(last.bf16_gains)

    def save(self) -> None:
        """Writes what is new, beside what others found; a cache that cannot be written costs time, not correctness."""
        global _LAST
        if not self.changed:
            return
        try:
            with turn(self.path):
                found, by_sample, gains = self._read()
                found |= dict(self.found)  # a copy: other threads may add to it
                rows = {key: vars(tiling) for key, tiling in found.items()}
                by_sample |= dict(self.by_sample)
                gains |= dict(self.bf16_gains)
                known = {"machine": self.machine, "found": rows, "by_sample": by_sample, "bf16_gains": gains}
                write_json(self.path, known)
                _LAST = _Contents(read_text(self.path, "the tuning cache"), self.machine, found, by_sample, gains)
        except FileError as error:
            _say_once(f"what is tuned is not kept, so that every process tunes anew: {error}")
            return
        self.changed = False

    @property
    def path(self) -> Path:
        """Raises FileError where the user has no place for a cache."""
        return self._path or cache_folder() / "tuning.json"


@dataclass(frozen=True)
class _Contents:
    """What a cache's file says, and its text: every repack reads the file, and to parse that of many layers is slow."""

    text: str
    machine: Mapping[str, Any]
    found: Mapping[str, Tiling]
    by_sample: Mapping[str, bool]
    bf16_gains: Mapping[str, float]

    @classmethod
    def of(cls, text: str) -> _Contents:
        """Checks it all; raises FileError, KeyError, TypeError, AttributeError or ValueError."""
        data = without_checksum(parse_json(text), checksum_of)
        found = {str(key): tiling_from_json(row) for key, row in data["found"].items()}
        by_sample = {str(key): flag(value) for key, value in data["by_sample"].items()}
        gains = {str(key): float(value) for key, value in data["bf16_gains"].items()}
        return cls(text, data["machine"], found, by_sample, gains)


_LAST: _Contents | None = None  # of the file that was read or written last


@cache
def _say_once(text: str) -> None:
    _LOG.warning(text)


def tiling_from_json(row: Mapping[str, Any]) -> Tiling:
    """Checks what a file says; raises ValueError or TypeError."""
    tiling = Tiling(**row)
    numbers = (tiling.group_size, tiling.block, tiling.chunk, tiling.panel, tiling.whole)
    fine = all(type(n) is int and 0 <= n < 2**31 for n in numbers) and tiling.group_size in (0, *GROUP_SIZES)
    flags = (tiling.inputs_first, tiling.serpentine, tiling.columns, tiling.tiles)
    if (
        not fine
        or tiling.block < 1
        or not 1 <= tiling.whole <= QUAD
        or not all(isinstance(flag, bool) for flag in flags)
    ):
        raise ValueError("no tiling")
    return tiling


@dataclass(frozen=True)
class Tuned:
    """The outcome: each layer's weights and tiling, microseconds where it was timed, and what the tiling depends on."""

    weights: Mapping[str, Weights]
    tilings: Mapping[str, Tiling]
    times_us: Mapping[str, float]
    keys: Mapping[str, str]


def tune(
    program: Program, layers: Mapping[str, Layer], inputs: tuple[Tensor, ...], cache: TuningCache | None = None,
    clock: Clock = time.perf_counter, progress: Callable[[str], None] = lambda _: None,
) -> Tuned:  # fmt: skip
    """Finds the fastest grouping and tiling of every packed layer of `program`.

    Args:
        program: lowered with any weights of the layers' shapes; left as it is.
        layers: by the name of their output.
        inputs: example inputs; timings hold for their shapes.
        cache: what is known already; new findings are added and saved.
        clock: seconds.
        progress: told the name of each layer that is timed.
    """
    cache = cache if cache is not None else TuningCache()
    plan = program.plan(shapes_of(inputs))
    weights, tilings, times = dict(program.weights), dict(program.tilings), {}
    keys = {step.name: key_of(step, layers[step.name], plan) for step in _tunable(plan, layers)}
    unknown = [step for step in _tunable(plan, layers) if keys[step.name] not in cache.found]
    if unknown:
        frame = plan.frame()
        with torch.inference_mode():
            plan.run_in(frame, inputs)  # so that every layer has an input
        bench = _Bench(plan, frame, inputs, clock, program.target)
        saved = time.monotonic()
        with timing():  # what is found is remembered: it must not be a neighbour's noise
            try:
                for step in unknown:
                    progress(step.name)
                    if keys[step.name] not in cache.found:
                        cache.found[keys[step.name]], times[step.name] = bench.fastest(step, layers[step.name])
                        cache.changed = True
                    if time.monotonic() - saved > UNSAVED_S:  # all layers of a large model take minutes
                        cache.save()
                        saved = time.monotonic()
            finally:
                cache.save()
        plan.release(frame)
    for name, key in keys.items():
        tilings[name] = cache.found[key]
        size = tilings[name].group_size
        if weights[name].packed.group_size != size:
            weights[name] = layers[name].pack(size)
    return Tuned(weights, tilings, times, keys)


def faster_by_sample(
    whole: Program, apart: Program, tuned: Sequence[Tuned], inputs: tuple[Tensor, ...],
    cache: TuningCache | None = None, clock: Clock = time.perf_counter,
) -> bool:  # fmt: skip
    """Whether a batch is computed faster by `apart`, sample by sample, than by `whole`; remembered like a tiling.

    Args:
        whole: tuned for the batch.
        apart: tuned for one sample, on one thread.
        tuned: what was found for each of the two.
        inputs: the batch.
        cache: what is known already.
        clock: seconds.
    """
    cache = cache if cache is not None else TuningCache()
    what = json.dumps(
        [shapes_of(inputs), whole.threads or torch.get_num_threads(), *(sorted(each.keys.items()) for each in tuned)]
    )
    key = hashlib.sha256(what.encode()).hexdigest()
    if key not in cache.by_sample:
        best = [math.inf, math.inf]
        with timing(), torch.inference_mode():
            for turn in range(1 + ROUNDS):
                for number, program in enumerate((whole, apart)):
                    start = clock()
                    program(*inputs)
                    seconds = clock() - start
                    best[number] = min(best[number], seconds) if turn else math.inf
        cache.by_sample[key] = best[1] < best[0]
        cache.changed = True
        cache.save()
    return cache.by_sample[key]


def streams_little(program: Program, inputs: tuple[Tensor, ...]) -> bool:
    """Whether reading all weights anew for each sample costs little: none do so for few operations each but small ones.

    Where a layer computes many positions, its weights are a small part of what it reads.
    """
    streamed = operations = 0
    for step in program.plan(shapes_of(inputs)).lowered.steps:
        if isinstance(step, NativeStep) and step.layer is not None and step.name in program.weights:
            packed = program.weights[step.name].packed
            operations += 2 * packed.values.size * math.prod(step.size)
            streamed += packed.values.nbytes + packed.index.nbytes if step.form is Linear else 0
    return streamed <= STREAMED * operations


def _tunable(plan: Plan, layers: Mapping[str, Layer]) -> list[NativeStep]:
    """The packed layers that have something to do: of an empty example there is nothing to time."""
    native = (step for step in plan.lowered.steps if isinstance(step, NativeStep))
    return [step for step in native if step.name in layers and step.layer and math.prod(step.size)]


def key_of(step: NativeStep, layer: Layer, plan: Plan) -> str:
    """What a layer's fastest tiling depends on, as text."""
    op = step.layer
    assert op is not None
    densities = [round(layer.density(size) * 20) / 20 for size in GROUP_SIZES]
    what = [op.kind, list(layer.weight.shape), layer.groups, _geometry(op), step.size, densities, plan.threads]
    what += [layer.together, op.gate, op.live] if isinstance(op, GatedConv2d) else []
    what += ["int8"] if layer.scale is not None else ["bf16"] if layer.bf16 else []
    return json.dumps(what)


_GEOMETRY = ("stride", "padding", "dilation", "cell", "threshold", "keep")  # of any kind; None where there is none


def _geometry(op: Op) -> list[Any]:
    return [op.attributes.get(key) for key in _GEOMETRY] + [len(op.inputs)]


@dataclass
class _Bench:
    plan: Plan
    frame: Any
    inputs: tuple[Tensor, ...]
    clock: Clock
    target: Target

    def __post_init__(self) -> None:
        self.plan.fill(self.frame, self.inputs)

    def fastest(self, step: NativeStep, layer: Layer) -> tuple[Tiling, float]:
        """The best tiling and its microseconds."""
        candidates: dict[Tiling, NativeSequence] = {}
        packs = {size: layer.pack(size) for size in layer.sizes(issubclass(step.form, ConvolutionOp))}
        for weights in packs.values():
            for tiling in tilings(step, weights, self.plan.threads, self.target):
                candidates[tiling] = NativeSequence([step.build(weights, tiling)])
        best = self.timed(candidates)
        winner = min(best, key=best.__getitem__)
        (op,) = candidates[winner].ops
        if turned := self.turned(step, packs[winner.group_size], winner, op):
            candidates[turned[0]] = NativeSequence([turned[1]])
            best = self.timed({tiling: candidates[tiling] for tiling in (winner, turned[0])})
            winner = min(best, key=best.__getitem__)
        return winner, best[winner] * 1e6

    def timed(self, candidates: Mapping[Tiling, NativeSequence]) -> dict[Tiling, float]:
        """The least seconds of each, in turns."""
        best = dict.fromkeys(candidates, math.inf)
        slots = self.frame.slots.ctypes.data
        for _ in range(ROUNDS):
            for tiling, sequence in candidates.items():
                if 1.5 * min(best.values()) < best[tiling] < math.inf:
                    continue
                start = self.clock()
                sequence.run_op(0, slots)
                best[tiling] = min(best[tiling], self.clock() - start)
        return best

    def turned(
        self, step: NativeStep, weights: Weights, tiling: Tiling, op: NativeOp
    ) -> tuple[Tiling, NativeOp] | None:
        """The tiling in serpentine order and its op, where that would fetch less than `op` does."""
        if step.form is not Conv2d or weights.packed.scale is not None or weights.packed.in_bf16:
            return None  # what is modelled is how floats are fetched
        other = replace(tiling, serpentine=True)
        made = step.build(weights, other)
        rising, turned = (
            fetched(each, step.form, tiling.group_size, self.target, self.frame.slots, Cache(), sample=True).total
            for each in (op, made)
        )  # fmt: skip
        return (other, made) if turned < rising else None


def tilings(step: NativeStep, weights: Weights, threads: int, target: Target) -> Iterable[Tiling]:
    """The ways to cut a layer's work that are worth timing."""
    groups, size = weights.packed.groups, weights.packed.group_size
    positions, batch = step.size
    if weights.packed.scale is not None:
        return _byte_tilings(step, weights, threads, target)
    if step.form is Recurrent:
        # an item is some sequences of the batch, all their steps
        walks = (False,) if weights.by_column is None else (False, True)
        return [Tiling(size, 1, min(batch, threads), columns=columns) for columns in walks]
    if threads > 1 and step.form is Conv2d and _by_rows(weights, positions, batch, threads):
        shares = -(-threads // batch)  # of an image: as many blocks for each

        def even(block: int) -> int:
            return -(-positions // (shares * -(-positions // (shares * block))))

        blocks = [(48, 0), (192, 0), (positions, 0), *(PANELS if size >= 4 else ())]
        return dict.fromkeys(Tiling(size, even(block), groups, True, panel) for block, panel in blocks)
    least = ITEMS_A_THREAD * threads if threads > 1 else 1
    blocks = [positions] if step.form is Linear else [48, 192, positions]
    made = []
    for block in dict.fromkeys(min(block, positions) for block in blocks):
        items = batch * -(-positions // block)
        chunk = -(-groups // max(1, -(-least // items)))
        made.append(Tiling(size, block, chunk, True))
    whole = Tiling(size, positions, -(-groups // max(least, -(-groups // 4))), False)
    if step.form is Conv2d and size >= 4:
        for block, panel in PANELS:
            items = batch * -(-positions // block)
            chunk = -(-groups // max(1, -(-least // items)))
            made.append(Tiling(size, min(block, positions), chunk, True, panel))
    return dict.fromkeys([*made, whole])


def _byte_tilings(step: NativeStep, weights: Weights, threads: int, target: Target) -> Iterable[Tiling]:
    """Those of a layer whose weight is bytes: also whether its channels are read as they lie or put together."""
    groups, size = weights.packed.groups, weights.packed.group_size
    positions, batch = step.size
    costs = {whole: weights.quads(whole).cost for whole in WHOLE}
    least, made = ITEMS_A_THREAD * threads if threads > 1 else 1, []
    for whole in (whole for whole in WHOLE if costs[whole] <= WORTH_TRYING * min(costs.values())):
        if step.form is Recurrent:  # an item is some sequences of the batch, all their steps
            made.append(Tiling(size, 1, min(batch, threads), whole=whole))
            continue
        for block in dict.fromkeys(min(block, positions) for block in (48, 192, positions)):
            chunk = -(-groups // max(1, -(-least // (batch * -(-positions // block)))))
            made.append(Tiling(size, block, chunk, True, whole=whole))
        made.append(Tiling(size, positions, -(-groups // max(least, -(-groups // 4))), False, whole=whole))
    same = {tuple(weights.quads(whole).pointer.tolist()): whole for whole in reversed(WHOLE)}
    made = [each for each in made if each.whole in same.values()]
    tiled = target.amx and issubclass(step.form, ConvolutionOp)
    return dict.fromkeys([*made, *(replace(each, tiles=True) for each in made if tiled)])


def _by_rows(weights: Weights, positions: int, batch: int, threads: int) -> bool:
    """Whether threads should share a convolution by images or rows, which they then find in their own caches.

    They do not where the weights, which each would read whole, are more than what they would have to exchange.
    """
    packed = weights.packed
    out, channels = packed.shape[0], packed.shape[1] * packed.conv_groups
    return batch >= threads or positions * (out + channels) > packed.values.size
