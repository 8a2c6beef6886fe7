"""Runs native ops: here, or those for other processors under qemu or as WebAssembly.

Skips where a tool for that is missing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from numpy.typing import NDArray

from autoprune.repack.aot.image import LINE, Image
from autoprune.repack.aot.targets import PLATFORMS, Platform
from autoprune.repack.aot.toolchain import toolchain
from autoprune.repack.kernels.compiler import OP, Kernel, Target, call_op, object_code
from autoprune.repack.native.op import NativeOp

# usdot has no platform of its own, and no CPU but qemu's newest
NAMED = {
    **PLATFORMS,
    "aarch64-i8mm": replace(
        PLATFORMS["aarch64-dotprod"],
        target=replace(PLATFORMS["aarch64-dotprod"].target, features="+neon,+dotprod,+i8mm"),
        emulator=("qemu-aarch64-static", "-cpu", "max"),
    ),
}
EMULATED = {
    name: NAMED[name].target for name in ("aarch64", "aarch64-dotprod", "aarch64-i8mm", "armv7", "riscv64", "wasm32")
}

_PAGE = 65536  # bytes of WebAssembly's memory
_OWN_PAGES = 320  # of a module: its stack and data
_DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void op(int64_t *fields, int64_t *slots, int64_t item, int64_t thread);
static void *taken(int64_t size) {
    char *memory = aligned_alloc(64, (size_t)(size / 64 * 64 + 64));
    if (!memory || fread(memory, 1, (size_t)size, stdin) != (size_t)size) exit(3);
    return memory;
}
int main(void) {
    int64_t *head = taken(32), *sizes = taken(8 * head[2]), *items = taken(8 * head[3]);
    int64_t *slots = malloc((size_t)(8 * head[2]));
    char *image = taken(head[0]);
    for (int64_t slot = 0; slot < head[2]; ++slot) slots[slot] = (int64_t)(uintptr_t)taken(sizes[slot]);
    slots[0] = (int64_t)(uintptr_t)image;
    for (int64_t item = 0; item < head[3]; ++item) op((int64_t *)(image + head[1]), slots, items[item], 0);
    for (int64_t slot = 1; slot < head[2]; ++slot)
        fwrite((void *)(uintptr_t)slots[slot], 1, (size_t)sizes[slot], stdout);
    return 0;
}
"""


def platform_of(target: Target) -> Platform:
    """The platform with such a target."""
    return next(each for each in NAMED.values() if each.target == target)


def run_op(op: NativeOp, slots: Sequence[NDArray[np.int32]], items: Iterable[int]) -> None:
    """Calls an op for items in turn, on its processor. The first of `slots` is not used, the others may be written."""
    if not op.kernel.target.triple:
        addresses = np.array([0, *(each.ctypes.data for each in slots[1:])], np.int64)
        for item in items:
            call_op(op.kernel, op.fields.ctypes.data, addresses.ctypes.data, int(item))
        return
    image = Image()
    place = image.put_op(op)
    platform, order = platform_of(op.kernel.target), [int(item) for item in items]
    run = _in_wasm if platform.is_wasm else _emulated
    memory = run(op.kernel, platform, image, place, slots, order)
    for slot in slots[1:]:
        slot[:] = np.frombuffer(memory[: slot.nbytes], np.int32)
        memory = memory[slot.nbytes :]
    assert not memory


@cache
def _built(kernel: Kernel) -> Path:
    """The program that runs a kernel, or the module that has it."""
    platform, folder = platform_of(kernel.target), Path(mkdtemp())
    tools = toolchain(platform)
    if tools is None or not (platform.is_wasm or shutil.which(platform.emulator[0])):
        pytest.skip(f"needs a compiler for {platform.about}, and what runs its programs")
    object_, into = folder / "op.o", folder / "program"
    object_.write_bytes(object_code(kernel.assembly, kernel.target))
    if platform.is_wasm:
        flags = ["-nostdlib", "-Wl,--no-entry", f"-Wl,--export={OP}", "-Wl,--import-memory"]
        subprocess.run([*tools.compiler, *flags, "-o", str(into), str(object_)], check=True)
    else:
        (folder / "driver.c").write_text(_DRIVER)
        tools.program([folder / "driver.c", object_], into)
    return into


def _emulated(
    kernel: Kernel, platform: Platform, image: Image, place: int, slots: Sequence[NDArray[np.int32]], items: list[int]
) -> bytes:
    sizes = [0, *(each.nbytes for each in slots[1:])]
    numbers = np.array([image.size, place, len(slots), len(items), *sizes, *items], np.int64)
    given = b"".join([numbers.tobytes(), image.data, *(each.tobytes() for each in slots[1:])])
    done = subprocess.run([*platform.emulator, str(_built(kernel))], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def _in_wasm(
    kernel: Kernel, platform: Platform, image: Image, place: int, slots: Sequence[NDArray[np.int32]], items: list[int]
) -> bytes:
    wasmtime = pytest.importorskip("wasmtime")
    store = wasmtime.Store()
    module = wasmtime.Module.from_file(store.engine, str(_built(kernel)))
    pages = 2 * _OWN_PAGES + sum(each.nbytes for each in slots) // _PAGE + image.size // _PAGE
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(pages, None)))
    linker = wasmtime.Linker(store.engine)
    linker.define(store, "env", "memory", memory)
    run = linker.instantiate(store, module).exports(store)[OP]
    top = _OWN_PAGES * _PAGE
    places = []
    for data in [image.data, *(each.tobytes() for each in slots[1:])]:
        places.append(top)
        memory.write(store, data, top)
        top += -(-len(data) // LINE) * LINE + LINE
    memory.write(store, np.array(places, np.int64).tobytes(), top)
    for item in items:
        run(store, places[0] + place, top, item, 0)
    return b"".join(
        bytes(memory.read(store, start, start + slot.nbytes)) for start, slot in zip(places[1:], slots[1:], strict=True)
    )
