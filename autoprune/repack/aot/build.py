"""Builds a repacked model ahead of time: an object file with its kernels and data, and what C needs to call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.errors import AutopruneError
from autoprune.repack.aot.assembly import compiled_calls
from autoprune.repack.aot.call import Call, mark
from autoprune.repack.aot.image import Image
from autoprune.repack.aot.interface import c_name, inputs_of, outputs_of, shape_text
from autoprune.repack.aot.targets import HOST, Platform, platform
from autoprune.repack.graph.extents import check_shapes
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.lower import lower
from autoprune.repack.lowering.per_sample import can_split
from autoprune.repack.lowering.steps import Lowered, NativeStep, TorchStep
from autoprune.repack.report import ProgramModel, RepackedModel
from autoprune.repack.runtime.program import Program, Shapes


@dataclass(frozen=True)
class Compiled:
    """A model compiled for one platform.

    Attributes:
        name: that its functions' names begin with.
        platform: what it is for.
        calls: for each set of input shapes.
        marks: what a workspace begins with once it is prepared, for each call; see `mark`.
        code: the object file.
        data_bytes: of it, the read-only data.
    """

    name: str
    platform: Platform
    calls: tuple[Call, ...]
    marks: tuple[int, ...]
    code: bytes
    data_bytes: int


def compiled(
    fast: RepackedModel, target: str = HOST, shapes: Sequence[Shapes] | None = None, name: str = "model",
    threads: int = 1, ops: bool = False,
) -> Compiled:  # fmt: skip
    """Compiles a program for a platform.

    Args:
        fast: what `repack` or `load` returned.
        target: a name of `PLATFORMS`, or `HOST`.
        shapes: of all inputs, for each call that the library shall have; those of the example when None.
        name: that the functions' names in C begin with.
        threads: the most that may work on one call.
        ops: whether single ops can be called, too, to be timed.

    Raises:
        AutopruneError: what is no program, an operation without a native form, shapes that the model does not take, or
            that are given twice.
    """
    if not isinstance(fast, RepackedModel):
        raise AutopruneError(f"a {type(fast).__name__} as it stands cannot be built: repack it first.")
    if not isinstance(fast, ProgramModel):
        raise AutopruneError(
            "only whole programs can be built, and this model is the original's code with packed layers in it"
            f"{': ' + fast.summary if fast.summary else ''}."
        )
    check_arguments(name, threads)
    found, image = platform(target), Image()
    given = [tuple(each.shape for each in fast.program.graph.inputs)] if shapes is None else _sets(shapes)
    own = c_name(name)
    calls = [_call(fast, own, each, len(given) > 1, found, threads, image) for each in given]
    marks = {call: mark(call, image) for call in calls}
    code = compiled_calls(marks, image, found.target, ops)
    return Compiled(own, found, tuple(calls), tuple(marks.values()), code, image.size)


def check_arguments(name: object, threads: object) -> None:
    """Raises AutopruneError for what is no name, or no number of threads."""
    if not isinstance(name, str):
        raise AutopruneError(f"name must be a string, not {name!r:.60}.")
    if type(threads) is not int or threads < 1:
        raise AutopruneError(f"threads must be an integer of 1 or more, not {threads!r:.60}.")


def _sets(shapes: Sequence[Shapes]) -> list[Shapes]:
    try:
        given = [tuple(tuple(shape) for shape in each) for each in shapes]
        extents: list[object] = [extent for each in given for shape in each for extent in shape]
    except TypeError:  # something that has no entries
        extents = [None]
    if not all(type(extent) is int and extent >= 0 for extent in extents):
        raise AutopruneError(
            "shapes must be a list of sets, each with a shape of integers for every input, such as "
            f"[[(1, 3, 32, 32)]], not {shapes!r:.100}."
        )
    if not given or len(set(given)) < len(given):
        raise AutopruneError(f"shapes must be one or more sets of shapes, none of them twice, not {given}.")
    return given


def _call(
    fast: ProgramModel, name: str, shapes: Shapes, several: bool, found: Platform, threads: int, image: Image
) -> Call:  # fmt: skip
    program = fast.program
    check_shapes(program.graph.inputs, program.graph.conditions, shapes)
    single = _single(program, shapes, found.target, threads)
    lowered = single or lower(program.graph, program.weights, shapes, found.target, threads, program.tilings)
    if refused := sorted({step.op.label for step in lowered.steps if isinstance(step, TorchStep)}):
        raise AutopruneError(
            f"cannot be built: torch runs {', '.join(refused)} in this program, which have no native form "
            f"for inputs of {' and '.join(map(shape_text, shapes))}."
        )
    ops = [
        step.build(program.weights.get(step.name), program.tilings.get(step.name, Tiling()))
        for step in lowered.steps if isinstance(step, NativeStep)
    ]  # fmt: skip
    inputs, samples = inputs_of(program.graph, shapes), 1 if single is None else shapes[0][0]
    return Call(
        prefix=f"{name}_{_suffix(shapes)}" if several else name,
        lowered=lowered,
        ops=tuple((op.kernel, image.put_op(op), op.items) for op in ops),
        constants={slot: image.put(tensor.detach().numpy()) for slot, tensor in lowered.constants.items()},
        inputs=inputs,
        outputs=tuple(each.of_samples(samples) for each in outputs_of(program.graph, lowered, inputs)),
        samples=samples,
        threads=threads,
    )


def _single(program: Program, shapes: Shapes, target: Target, threads: int) -> Lowered | None:
    """The program for one sample of a batch, where that is how a batch is computed."""
    if not program.takes_apart(shapes, threads):
        return None
    samples = tuple((1, *shape[1:]) for shape in shapes)
    one = lower(program.graph, program.weights, samples, target, 1, program.tilings)
    return one if can_split(one) else None


def _suffix(shapes: Shapes) -> str:
    return "_".join("x".join(map(str, shape)) or "0" for shape in shapes)
