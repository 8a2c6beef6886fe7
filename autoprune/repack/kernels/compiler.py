"""Compiles IR: for this machine, where it stays in memory, or into object files for any."""

from __future__ import annotations

import ctypes
import inspect
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import llvmlite.binding as llvm
import llvmlite.ir as ir
import torch

from autoprune.errors import AutopruneError

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

_LOCK = threading.Lock()  # LLVM's global state is not thread-safe
_ENGINES: list[Any] = []  # a compiled function lives as long as its engine
_WIDTHS = (("avx512f", 16), ("avx", 8))  # floats in a vector register, by feature
_REGISTERS: Mapping[str, int] = {"aarch64": 32, "arm64": 32, "riscv64": 8}
"""Family -> vector registers, where there are not 16; of a family without vectors those that its scalars fill."""
_ARM64 = frozenset({"aarch64", "arm64"})
_FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "aarch64": ((),),
    "arm64": ((),),
    "armv7": (("vfp4",),),
    "riscv64": (("f",),),
    "wasm32": (),
}  # family -> sets of features, of which one is enough; that of x86 where a family is not among them
_PERMIT_TILES = (158, 0x1023, 18)  # arch_prctl, ARCH_REQ_XCOMP_PERM, the state of tile registers
DOT_BF16 = "vdpbf16ps (AVX512_BF16)"
OP = "op"  # the function of a kernel's module
Dot = Literal["vnni", "usdot", "sdot", "madd", "halves", "plain"]
_DOTS: tuple[tuple[int, tuple[str, ...], Dot], ...] = (
    (16, ("avx512vnni",), "vnni"),
    (8, ("avxvnni",), "vnni"),
    (8, ("avx512vnni", "avx512vl"), "vnni"),
    (4, ("avxvnni",), "vnni"),
    (4, ("avx512vnni", "avx512vl"), "vnni"),
    (16, ("avx512bw",), "madd"),
    (8, ("avx2",), "madd"),
    (4, ("i8mm",), "usdot"),
    (4, ("dotprod",), "sdot"),
    (4, ("neon",), "halves"),
    (4, ("ssse3",), "madd"),
    (4, ("simd128",), "madd"),
)  # (lanes, features, dot product), the best first


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        lanes: floats in a vector register: 4, 8 or 16.
        cpu: LLVM's name of the CPU.
        features: LLVM's feature string.
        triple: LLVM's name of processor family and system; empty: this machine's.
        abi: LLVM's name of the calling convention, where a family has several.
    """

    lanes: int
    cpu: str
    features: str
    triple: str = ""
    abi: str = ""

    @property
    def family(self) -> str:
        """The processor family as triples name it, such as x86_64 or aarch64."""
        return (self.triple or llvm.get_default_triple()).split("-")[0]

    @property
    def registers(self) -> int:
        """Vector registers."""
        return 32 if self.lanes == 16 else _REGISTERS.get(self.family, 16)

    @property
    def fused(self) -> bool:
        """Whether it multiplies and adds with one rounding, by one instruction."""
        needed = _FUSED.get(self.family, (("fma",), ("avx512f",)))
        return any(self._has(*each) for each in needed)

    @property
    def dot(self) -> Dot:
        """How four products of bytes are added to each 32-bit lane.

        By one instruction (vnni, usdot; sdot of two signed bytes), by one for each two pairs of 16-bit numbers (madd),
        by products of signed bytes that are added in 16 bits first (halves), or as LLVM multiplies (plain).
        """
        return next((dot for lanes, needed, dot in _DOTS if lanes == self.lanes and self._has(*needed)), "plain")

    @property
    def signed(self) -> bool:
        """Whether its dot product takes signed bytes alone: 128 is taken from each unsigned one before."""
        return self.dot in ("sdot", "halves")

    @property
    def by_lane(self) -> bool:
        """Whether a vector is multiplied by one lane of another, or that lane broadcast, by one instruction."""
        return self.family in _ARM64

    @property
    def holds_masks(self) -> bool:
        """Whether masks take vector registers, of which it has enough to keep them there."""
        return self.family in _ARM64

    @property
    def amx(self) -> bool:
        """Whether it multiplies tiles of bytes, see `dot_amx`."""
        return self.lanes == 16 and self.dot == "vnni" and self._has("amx-tile", "amx-int8")

    @property
    def bf16(self) -> bool:
        """Whether it adds products of two bfloat16 numbers to each 32-bit lane, by one instruction, `DOT_BF16`."""
        return self.lanes == 16 and self._has("avx512bf16", "avx512vl")

    def _has(self, *names: str) -> bool:
        named = [(feature[1:], feature.startswith("+")) for feature in self.features.split(",") if feature]
        return all(dict(named).get(name, False) for name in names)  # the last word on a feature counts

    def tile(self, rows: int) -> tuple[int, int]:
        """Register tile for groups of `rows` filters: (rows, vectors of positions) that fit the registers."""
        if self.registers == 32:
            return (8, 3) if rows >= 8 else (4, 6) if rows >= 4 else (2, 10) if rows >= 2 else (1, 12)
        if self.family == "armv7":  # LLVM loads ahead: wider tiles leave it no room
            return (4, 2) if rows >= 4 else (2, 4) if rows >= 2 else (1, 6)
        if self.registers == 8:
            return (4, 1) if rows >= 4 else (2, 2) if rows >= 2 else (1, 5)
        return (4, 3) if rows >= 4 else (2, 5) if rows >= 2 else (1, 8)


@cache
def host() -> Target:
    """This machine, with what the system lets a process use of it."""
    features = llvm.get_host_cpu_features()
    if features.get("amx-tile") and not _amx_permitted():
        features["amx-tile"] = False
    lanes = next((lanes for name, lanes in _WIDTHS if features.get(name)), 4)
    return Target(lanes, llvm.get_host_cpu_name(), features.flatten())


def _amx_permitted() -> bool:
    """Asks Linux for the tile registers, once for all threads: their state makes a thread's larger."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    return int(ctypes.CDLL(None).syscall(*_PERMIT_TILES)) == 0


def narrowed(lanes: int) -> Target:
    """This machine restricted to narrower vectors; 4 also forgets AVX, as on a plain x86-64."""
    full = host()
    off = [name for name, on in llvm.get_host_cpu_features().items() if on and name.startswith("avx512")]
    if lanes == 4:
        off = [
            name for name, on in llvm.get_host_cpu_features().items() if on and name.startswith(("avx", "fma", "f16c"))
        ]
    features = ",".join([full.features, *(f"-{name}" for name in off)])
    return Target(min(lanes, full.lanes), full.cpu, features)


def once_a_process(build: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Makes `build` run once for each set of arguments, whichever thread asks first."""
    lock, cached = threading.Lock(), cache(build)

    @wraps(build)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        with lock:
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return made


class Kernel:
    """A native op ``op(fields, slots, item, thread)`` for one target.

    Attributes:
        name: of the function that emits it.
        target: what it is made for.

    Raises what `emit` raises: what it cannot be is an error at once.
    """

    def __init__(self, name: str, target: Target, emit: Callable[[], ir.Module]) -> None:
        self.name, self.target, self._emit = name, target, emit
        self._text: str | None = str(emit())
        self._lock = threading.Lock()
        self._address: int | None = None

    @property
    def assembly(self) -> str:
        """Its LLVM IR, in which it is the function `OP`; up to a megabyte, which is not kept once it is compiled."""
        return self._text or str(self._emit())

    @property
    def address(self) -> int:
        """Of the compiled op; compiled when it is first asked for.

        Raises:
            AutopruneError: this process may not run compiled code.
        """
        with self._lock:
            if self._address is None:
                self._address, self._text = compile_op(self.assembly, OP, self.target), None
            return self._address


def kernel(emit: Callable[Arguments, ir.Module]) -> Callable[Arguments, Kernel]:
    """Makes what emits an op give its `Kernel`: one a process for each set of arguments."""
    signature = inspect.signature(emit)

    @once_a_process
    @wraps(emit)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Kernel:
        target = signature.bind(*args, **kwargs).arguments.get("target") or host()
        return Kernel(emit.__name__, target, partial(emit, *args, **kwargs))

    return made


def compile_function(module: ir.Module, name: str, target: Target, arguments: int) -> Callable[..., None]:
    """Returns the module's function `name`, taking `arguments` addresses (or integers), as a Python callable."""
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    return prototype(compile_op(module, name, target))


def compile_op(module: ir.Module | str, name: str, target: Target) -> int:
    """Returns the address of the function `name` of a module, or its text; it stays valid as long as the process."""
    if reason := refused():
        raise AutopruneError(reason)
    code = object_code(module, target)
    with _LOCK:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(target))
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _ENGINES.append(engine)
        return int(engine.get_function_address(name))


def object_code(module: ir.Module | str, target: Target) -> bytes:
    """The module, or its text, as an object file, optimised; one that stands alone where the target has a triple."""
    with _LOCK:
        return _emitted(_parsed(str(module), target), target)


def linked_code(module: ir.Module, kernels: Mapping[str, Kernel], target: Target) -> bytes:
    """`object_code` of a module together with the kernels that it declares, by the names it has for them."""
    with _LOCK:
        whole = _parsed(str(module), target)
        for name, each in kernels.items():
            part = _parsed(each.assembly, target)
            part.get_function(OP).name = name
            whole.link_in(part)
            whole.get_function(name).linkage = "internal"
        for function in whole.functions:
            if not function.is_declaration:  # 32-bit ARM would want unwinding tables, and a library for them
                function.add_function_attribute("nounwind")
        return _emitted(whole, target)


def _parsed(text: str, target: Target) -> Any:
    return llvm.parse_assembly(text if target.fused else text.replace("llvm.fma.", "llvm.fmuladd."))


def _emitted(parsed: Any, target: Target) -> bytes:
    machine = _machine(target)
    if target.triple:
        parsed.triple, parsed.data_layout = target.triple, str(machine.target_data)
    parsed.verify()
    _optimise(parsed, machine)
    return bytes(machine.emit_object(parsed))


def _machine(target: Target) -> Any:
    _initialise(bool(target.triple))
    family = llvm.Target.from_triple(target.triple) if target.triple else llvm.Target.from_default_triple()
    # llvmlite's defaults are those of code that is run where it is made, which no shared library can hold.
    alone = {"reloc": "pic", "codemodel": "default", "abiname": target.abi} if target.triple else {}
    return family.create_target_machine(cpu=target.cpu, features=target.features, opt=2, **alone)


def _optimise(parsed: Any, machine: Any) -> None:
    # The kernels say themselves what is a vector and what is unrolled: more work for LLVM makes them no faster.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = True  # of the few plain loops, such as copies
    options.slp_vectorization = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)


def call_op(op: Kernel, fields: int, slots: int, item: int, thread: int = 0) -> None:
    """Calls one native op for one item; fields and slots are addresses."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(op.address)(fields, slots, item, thread)


@cache
def _initialise(others: bool) -> None:
    """LLVM's code for this machine, or for all `others` too."""
    if others:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    else:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()


@cache
def unavailable() -> str | None:
    """Why kernels cannot be compiled on this machine; None when they can."""
    try:
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "nothing")
        ir.IRBuilder(function.append_basic_block()).ret_void()
        compile_function(module, "nothing", host(), 0)()
    except AutopruneError as error:
        return str(error)
    except (RuntimeError, OSError) as error:
        return f"llvmlite cannot compile here: {error}"
    return None


def refused() -> str | None:
    """What the system has against code that is written and then run: LLVM would crash. Asked with a page of memory.

    Where it is refused, torch's own compiled kernels (oneDNN) fail too, and torch is told to do without them.
    """
    if sys.platform == "win32":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        place = ctypes.c_char.from_buffer(page)
        given = (ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(mmap.PAGESIZE))
        denied = libc.mprotect(*given, mmap.PROT_READ | mmap.PROT_EXEC)
        error = ctypes.get_errno()
        del place  # or the page could not be given back
    if not denied:
        return None
    torch.backends.mkldnn.set_flags(False)
    return (
        f"this process may not make memory executable ({os.strerror(error)}), so no kernel can be compiled: what would "
        "allow it is MemoryDenyWriteExecute=no for systemd, execmem for SELinux"
    )


refused()  # at once: torch must know before its first convolution
