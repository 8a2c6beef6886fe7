"""The C compilers that link what is built: this machine's, Debian's cross compilers, or the one that comes with Zig."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from autoprune.errors import AutopruneError
from autoprune.repack.aot.targets import Platform
from autoprune.repack.kernels.compiler import host

_ZIG = (sys.executable, "-m", "ziglang")
_STACK = 2**16  # bytes, of a WebAssembly module


@dataclass(frozen=True)
class Toolchain:
    """What makes libraries and programs for a platform.

    Attributes:
        compiler: the command of its C compiler, which links too.
        archiver: the command that makes static libraries.
        shared: more options of the compiler for shared libraries.
    """

    compiler: tuple[str, ...]
    archiver: tuple[str, ...]
    shared: tuple[str, ...] = ()

    def shared_library(self, objects: Sequence[Path], into: Path) -> None:
        """Links objects; raises AutopruneError with what the linker says."""
        name = f"-Wl,-soname,{into.name}"
        _run([*self.compiler, "-shared", *self.shared, name, "-o", str(into), *map(str, objects)])

    def static_library(self, objects: Sequence[Path], into: Path) -> None:
        """Archives objects; raises AutopruneError with what the archiver says."""
        _run([*self.archiver, "rcs", str(into), *map(str, objects)])

    def program(self, sources: Sequence[Path], into: Path, flags: Sequence[str] = ()) -> None:
        """Compiles C files and links them with objects or libraries, all of it into one file that needs no other.

        Raises:
            AutopruneError: with what the compiler says.
        """
        _run([*self.compiler, "-O2", "-static", *flags, "-o", str(into), *map(str, sources)])


@dataclass(frozen=True)
class WasmLinker:
    """What makes WebAssembly modules.

    Attributes:
        command: of the linker.
    """

    command: tuple[str, ...]

    def module(self, objects: Sequence[Path], into: Path, names: Sequence[str]) -> None:
        """Links objects into a module that imports nothing and exports its memory, these names and `__heap_base`.

        Raises:
            AutopruneError: with what the linker says.
        """
        exports = [f"--export={name}" for name in (*names, "__heap_base")]
        layout = ["--no-entry", "--stack-first", "-z", f"stack-size={_STACK}"]
        _run([*self.command, *layout, *exports, "-o", str(into), *map(str, objects)])


def toolchain(platform: Platform) -> Toolchain | None:
    """The first one that is installed; None where there is none."""
    own = platform.target.family == host().family
    prefixes = ["", f"{platform.gnu}-"] if own else [f"{platform.gnu}-"] if platform.gnu else []
    for prefix in prefixes:
        for name in ("cc", "gcc", "clang"):
            if shutil.which(prefix + name) and shutil.which(f"{prefix}ar"):
                return Toolchain((prefix + name,), (f"{prefix}ar",))
    if find_spec("ziglang") is not None:
        # not its C library, which would be compiled first: memory functions and divisions are the compiler's own
        return Toolchain((*_ZIG, "cc", "-target", platform.zig), (*_ZIG, "ar"), ("-nostdlib", "-rtlib=compiler-rt"))
    return None


def linker() -> WasmLinker | None:
    """The first one that is installed; None where there is none."""
    if shutil.which("wasm-ld"):
        return WasmLinker(("wasm-ld",))
    return WasmLinker((*_ZIG, "wasm-ld")) if find_spec("ziglang") is not None else None


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AutopruneError(f"{' '.join(command[:3])} failed: {(done.stderr or done.stdout).strip()}")
