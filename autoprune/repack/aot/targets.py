"""The processors that models are built for: a row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoprune.errors import AutopruneError, did_you_mean
from autoprune.repack.kernels.compiler import Target, host

HOST = "host"


@dataclass(frozen=True)
class Platform:
    """What a model can be built for.

    Attributes:
        about: which machines that is, for listings.
        target: what the kernels are compiled for.
        pointer_bytes: of an address.
        zig: the name that Zig's C compiler knows it by.
        gnu: the prefix of Debian's cross compiler, such as ``aarch64-linux-gnu``; empty: there is none.
        emulator: the command that runs its programs on other machines; empty: there is none.
    """

    about: str
    target: Target
    pointer_bytes: int
    zig: str
    gnu: str
    emulator: tuple[str, ...] = ()

    @property
    def debian_package(self) -> str:
        """Debian's package of the cross compiler, such as ``gcc-x86-64-linux-gnu``; empty: there is none."""
        return self.gnu and f"gcc-{self.gnu.replace('_', '-')}"

    @property
    def is_wasm(self) -> bool:
        """Whether it is WebAssembly, which has no shared libraries."""
        return self.target.family == "wasm32"


_X86 = "x86_64-unknown-linux-gnu"
_V2 = "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16"
_V3 = f"{_V2},+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
_V4 = f"{_V3},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
_RISCV = "+m,+a,+f,+d,+c"

PLATFORMS: Mapping[str, Platform] = {
    "x86-64-v2": Platform(
        "x86-64 with SSE4.2: almost any PC", Target(4, "x86-64-v2", _V2, _X86), 8, "x86_64-linux-gnu",
        "x86_64-linux-gnu", ("qemu-x86_64-static", "-cpu", "Nehalem"),
    ),
    "x86-64-v3": Platform(
        "x86-64 with AVX2: PCs since about 2013", Target(8, "x86-64-v3", _V3, _X86), 8, "x86_64-linux-gnu",
        "x86_64-linux-gnu", ("qemu-x86_64-static", "-cpu", "Haswell"),
    ),
    "x86-64-v4": Platform(
        "x86-64 with AVX-512: servers", Target(16, "x86-64-v4", _V4, _X86), 8, "x86_64-linux-gnu",
        "x86_64-linux-gnu",
    ),
    "aarch64": Platform(
        "64-bit ARM: Raspberry Pi 3 and later, phones, Graviton",
        Target(4, "cortex-a53", "+neon", "aarch64-unknown-linux-gnu"),
        8, "aarch64-linux-gnu", "aarch64-linux-gnu", ("qemu-aarch64-static", "-cpu", "cortex-a53"),
    ),
    "aarch64-dotprod": Platform(
        "64-bit ARM with products of bytes: Raspberry Pi 5, phones since 2018",
        Target(4, "cortex-a76", "+neon,+dotprod", "aarch64-unknown-linux-gnu"),
        8, "aarch64-linux-gnu", "aarch64-linux-gnu", ("qemu-aarch64-static", "-cpu", "cortex-a76"),
    ),
    "armv7": Platform(
        "32-bit ARM with NEON and VFPv4: Raspberry Pi 2, older phones",
        Target(4, "cortex-a7", "+neon,+vfp4", "armv7-unknown-linux-gnueabihf"),
        4, "arm-linux-gnueabihf", "arm-linux-gnueabihf", ("qemu-arm-static", "-cpu", "cortex-a7"),
    ),
    "riscv64": Platform(
        "64-bit RISC-V without vectors", Target(4, "generic-rv64", _RISCV, "riscv64-unknown-linux-gnu", "lp64d"),
        8, "riscv64-linux-gnu", "riscv64-linux-gnu", ("qemu-riscv64-static", "-cpu", "rv64"),
    ),
    "wasm32": Platform(
        "WebAssembly with SIMD: browsers since 2023, wasmtime",
        Target(4, "generic", "+simd128,+bulk-memory", "wasm32-unknown-unknown"), 4, "wasm32-wasi-musl", "",
    ),
}  # fmt: skip
"""Name -> what it stands for. `HOST` is this machine, with everything it can do."""


def platform(name: object) -> Platform:
    """What a name of `PLATFORMS`, or `HOST`, stands for.

    Raises:
        AutopruneError: there is none of that name, or this machine is not of a family that can be built for.
    """
    if isinstance(name, str) and name in PLATFORMS:
        return PLATFORMS[name]
    if name != HOST:
        raise AutopruneError(f"target: {did_you_mean(str(name), [HOST, *PLATFORMS])}")
    own = host()
    like = next((each for each in PLATFORMS.values() if each.target.family == own.family), None)
    if like is None:
        raise AutopruneError(f"nothing is built for processors of the family {own.family}: {', '.join(PLATFORMS)} are.")
    # no tile registers: a process must ask its system for them
    features = f"{own.features},-amx-tile,-amx-int8,-amx-bf16"
    target = Target(own.lanes, own.cpu, features, like.target.triple, like.target.abi)
    return Platform("this machine", target, like.pointer_bytes, like.zig, like.gnu)
