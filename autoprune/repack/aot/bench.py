"""A program that times built models where it is run: all of them in turns, or one's operations one after another.

It is one file that needs no other, takes no arguments and reads nothing, so that whatever starts a program can start
it. It holds the models, their inputs and how they are timed, which is as `latency.timer` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.files import temporary_folder
from autoprune.latency.timer import Protocol
from autoprune.repack.aot.assembly import data_module
from autoprune.repack.aot.build import Compiled
from autoprune.repack.aot.call import Call
from autoprune.repack.aot.image import LINE
from autoprune.repack.aot.targets import Platform, platform
from autoprune.repack.aot.toolchain import Toolchain, toolchain
from autoprune.repack.kernels.compiler import object_code


def bench_program(
    models: Mapping[str, Compiled], inputs: Sequence[Tensor], target: str, protocol: Protocol, into: Path,
    *, ops: bool = False,
) -> None:  # fmt: skip
    """Builds the program.

    Args:
        models: name in its output -> one built with `ops`, on one thread, for one set of shapes. One may stand under
            several names; different ones have different names in C. None: the program tells what it runs on.
        inputs: of an inference, the same for all models.
        target: that the models are built for.
        protocol: `samples` rounds are timed.
        into: the file that is written.
        ops: whether operations are timed, in place of whole models.

    Raises:
        AutopruneError: there is no compiler for the target, or it fails.
    """
    found = platform(target)
    tools = compiler_for(found, target)
    own = {each.name: each for each in models.values()}
    with temporary_folder() as folder:
        (folder / "bench.c").write_bytes((files("autoprune.repack.aot") / "bench.c").read_bytes())
        (folder / "models.h").write_text(_header(models, protocol, ops), encoding="utf-8")
        sources = [folder / "bench.c"]
        held = {f"bench_input_{number}": _bytes(x) for number, x in enumerate(inputs)} if own else {}
        for name, code in {
            **{name: each.code for name, each in own.items()},
            **({"bench_inputs": object_code(data_module(held), found.target)} if held else {}),
        }.items():
            sources.append(folder / f"{name}.o")
            sources[-1].write_bytes(code)
        tools.program(sources, into)


def compiler_for(found: Platform, target: str) -> Toolchain:
    """What links programs for a platform.

    Raises:
        AutopruneError: there is none.
    """
    tools = toolchain(found)
    if tools is None:
        debian = f"Debian's {found.debian_package}, or " if found.debian_package else ""
        raise AutopruneError(
            f"no C compiler for the target {target!r} is here, which links the program that is timed: install "
            f"{debian}Zig's, which is for all targets: pip install ziglang."
        )
    return tools


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().cpu().numpy().tobytes()


def _header(models: Mapping[str, Compiled], protocol: Protocol, ops: bool) -> str:
    """What bench.c includes: the models behind functions that are all alike, and how they are timed."""
    own = list({each.name: each.calls[0] for each in models.values()}.values())
    inputs = own[0].inputs if own else ()
    rows = []
    for name, each in models.items():
        functions = ", ".join(f"{each.name}_own_{what}" for what in ("prepare", "run", "op"))
        rows.append(f'    {{"{name}", {len(each.calls[0].ops) * each.calls[0].samples}, {functions}}},')
    return "\n".join(
        [
            *(f"extern const unsigned char bench_input_{number}[];" for number in range(len(inputs))),
            *map(_functions, own),
            "static const struct model MODELS[] = {",
            *(rows or ["    {0},"]),
            "};",
            f"enum {{ COUNT = {len(rows)}, ROUNDS = {0 if ops or not rows else protocol.samples},",
            f"       OP_ROUNDS = {protocol.samples if ops else 0}, WARMUP = {max(1, protocol.warmup)},",
            f"       LEAD = {protocol.lead} }};",
            f"static const double MIN_SAMPLE_MS = {protocol.min_sample_ms!r};",
            "",
        ]
    )


def _functions(call: Call) -> str:
    """A model's functions in C, its memory, and functions of no other arguments around them."""
    name = call.prefix
    types = ", ".join(["const void *"] * len(call.inputs) + ["void *"] * len(call.outputs) + ["void *"])
    outputs = [f"{name}_own_{number}" for number in range(len(call.outputs))]
    given = ", ".join([f"bench_input_{number}" for number in range(len(call.inputs))] + outputs + [f"{name}_own"])
    sizes = {
        **{name: each.port.bytes for name, each in zip(outputs, call.outputs, strict=True)},
        f"{name}_own": call.workspace_bytes,
    }
    return "\n".join(
        [
            f"int32_t {name}_prepare(void *);",
            f"int32_t {name}_run({types});",
            f"int32_t {name}_run_op({types}, int32_t);",
            *(f"static _Alignas({LINE}) unsigned char {each}[{max(1, size)}];" for each, size in sizes.items()),
            f"static int32_t {name}_own_prepare(void) {{ return {name}_prepare({name}_own); }}",
            f"static int32_t {name}_own_run(void) {{ return {name}_run({given}); }}",
            f"static int32_t {name}_own_op(int32_t op) {{ return {name}_run_op({given}, op); }}",
        ]
    )
