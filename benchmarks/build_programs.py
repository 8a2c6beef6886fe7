"""Programs of built models for any processor, run here: natively, under qemu's emulators, or in wasmtime."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.repack.aot.build import Compiled
from autoprune.repack.aot.call import Call
from autoprune.repack.aot.interface import Port
from autoprune.repack.aot.targets import Platform
from autoprune.repack.aot.toolchain import toolchain
from autoprune.repack.kernels.compiler import host

HARNESS = Path(__file__).with_name("build_harness.c")


@dataclass(frozen=True)
class Runs:
    """How a platform's programs run on this machine; `command` goes before the program."""

    command: tuple[str, ...] = ()
    wasm: bool = False


def runs(platform: Platform) -> Runs | str:
    """How; or what is missing."""
    if platform.is_wasm:
        try:
            import wasmtime  # noqa: F401
        except ImportError:
            return "wasmtime is not installed"
        return Runs(wasm=True) if toolchain(platform) else "ziglang is not installed"
    if toolchain(platform) is None:
        return f"neither {platform.gnu}-gcc nor ziglang is installed"
    if platform.emulator:
        return Runs(platform.emulator) if shutil.which(platform.emulator[0]) else f"{platform.emulator[0]} is missing"
    own = host()
    if own.family == platform.target.family and own.lanes >= platform.target.lanes:
        return Runs()
    return "this machine has no such instructions, and no emulator has them"


def header(call: Call) -> str:
    """What the harness needs to know."""

    def sizes(ports: Sequence[Port]) -> str:
        return "{" + ", ".join(str(each.bytes) for each in ports) + "}"

    outputs = [each.port for each in call.outputs]
    kinds = ", ".join([*["const void *"] * len(call.inputs), *["void *"] * (len(outputs) + 1)])
    given = [*(f"(x)[{n}]" for n in range(len(call.inputs))), *(f"(y)[{n}]" for n in range(len(outputs))), "workspace"]
    return "\n".join([
        f"int {call.prefix}_prepare(void *);", f"int {call.prefix}_run({kinds});",
        f"#define PREPARE {call.prefix}_prepare",
        f"#define RUN(x, y, workspace) {call.prefix}_run({', '.join(given)})",
        f"#define WORKSPACE {call.workspace_bytes}", f"#define INPUTS {sizes(call.inputs)}",
        f"#define OUTPUTS {sizes(outputs)}", "",
    ])  # fmt: skip


def linked(compiled: Compiled, folder: Path, turns: int = 2) -> Path:
    """A program in `folder` that runs the model so many times.

    Raises:
        AutopruneError: what the linker says.
    """
    found = toolchain(compiled.platform)
    assert found is not None
    (folder / "model.h").write_text(header(compiled.calls[0]))
    code, program = folder / "model.o", folder / "program"
    code.write_bytes(compiled.code)
    found.program([HARNESS, code], program, [f"-I{folder}", f"-DTURNS={turns}"])
    return program


def call(compiled: Compiled, inputs: tuple[Tensor, ...], folder: Path, how: Runs) -> list[Tensor]:
    """The model's outputs, from a program that is made and run in `folder`.

    Raises:
        AutopruneError: what the linker says.
        RuntimeError: the program ended otherwise than it should.
    """
    program, (model,) = linked(compiled, folder), compiled.calls
    given, made = folder / "given", folder / "made"
    given.write_bytes(b"".join(x.contiguous().numpy().tobytes() for x in inputs))
    if how.wasm:
        _in_wasm(program, folder)
    else:
        done = subprocess.run([*how.command, str(program), str(given), str(made)], capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr.decode().strip()[-300:]}")
    found, data = [], made.read_bytes()
    for result in model.outputs:
        port = result.port
        size = port.bytes
        found.append(torch.from_numpy(np.frombuffer(data[:size], port.dtype).reshape(port.shape).copy()))
        data = data[size:]
    return found


def instructions(compiled: Compiled, inputs: tuple[Tensor, ...], folder: Path, how: Runs, turns: int) -> int:
    """What a program executes that runs the model so many times, counted by qemu one by one.

    Raises:
        AutopruneError: what the linker says.
        RuntimeError: the program ended otherwise than it should.
    """
    program, given = linked(compiled, folder, turns), folder / "given"
    given.write_bytes(b"".join(x.contiguous().numpy().tobytes() for x in inputs))
    command = [*how.command, "-singlestep", "-d", "exec,nochain", str(program), str(given), str(folder / "made")]
    count = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        while part := running.stderr.read(1 << 20):
            count += part.count(b"\n")
    if running.returncode:
        raise RuntimeError(f"exit status {running.returncode}")
    return count


def _in_wasm(program: Path, folder: Path) -> None:
    import wasmtime

    engine, wasi = wasmtime.Engine(), wasmtime.WasiConfig()
    wasi.argv = ("program", "given", "made")
    wasi.preopen_dir(str(folder), ".")
    store, linker = wasmtime.Store(engine), wasmtime.Linker(engine)
    store.set_wasi(wasi)
    linker.define_wasi()
    instance = linker.instantiate(store, wasmtime.Module.from_file(engine, str(program)))
    try:
        instance.exports(store)["_start"](store)
    except wasmtime.ExitTrap as ended:
        if ended.code:
            raise RuntimeError(f"exit status {ended.code}") from ended
