"""A process whose engines may use no more of the CPU than an instruction set: what a CPU without the rest would do.

oneDNN, by which OpenVINO and torch compute, reads a variable. ONNX Runtime has no such switch, so Linux is told to
refuse AMX to the process: tiles can only be used after asking for them (``arch_prctl(ARCH_REQ_XCOMP_PERM)``), and
engines that are refused do without. What is refused stays so in every program that the process starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence

from autoprune.errors import AutopruneError

ALL = "all"  # of the CPU
VARIABLE = "ONEDNN_MAX_CPU_ISA"
ISAS = {"vnni": "AVX512_CORE_VNNI"}
HELD = {
    ALL: "with everything the CPU has",
    "vnni": f"held to AVX-512 with VNNI (`--isa vnni`: {VARIABLE}={ISAS['vnni']} for OpenVINO and torch, so neither "
    "AMX nor bfloat16; AMX refused to the whole process by Linux, since ONNX Runtime has no switch)",
}

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILES = 158, 0x1023, 18
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # of classic BPF
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # in seccomp_data
_X86_64, _ALLOW, _REFUSE = 0xC000003E, 0x7FFF0000, 0x00050001  # refused with EPERM
_FILTER = (  # (operation, lines to jump if equal, if not, value)
    (_LOAD, 0, 0, _ARCHITECTURE_AT),
    (_EQUAL, 0, 5, _X86_64),
    (_LOAD, 0, 0, _NUMBER_AT),
    (_EQUAL, 0, 3, _ARCH_PRCTL),
    (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
    (_EQUAL, 0, 1, _ARCH_REQ_XCOMP_PERM),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))


def hold_to(isa: str, command: Sequence[str]) -> None:
    """Sees to it that engines use no more than `isa`, for good: starts this process anew where it is too late for that.

    Args:
        isa: a key of ISAS.
        command: of this process, behind ``python``.

    Raises:
        AutopruneError: there is no way to do so here.
    """
    refuse_tiles()
    if os.environ.get(VARIABLE) != ISAS[isa]:  # what was imported may have read it already
        os.environ[VARIABLE] = ISAS[isa]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])


def refuse_tiles() -> None:
    """Makes Linux refuse AMX's tiles to this process and to those that it starts.

    Raises:
        AutopruneError: this is no Linux on x86-64, it takes no filter, or the process has the tiles already.
    """
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        raise AutopruneError("engines can be held to an instruction set on Linux and x86-64 alone: leave --isa out.")
    libc = ctypes.CDLL(None, use_errno=True)
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _FILTER))
    program = _Program(len(_FILTER), ctypes.addressof(lines))
    for request in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*request) != 0:
            raise AutopruneError(f"Linux does not refuse AMX to this process: {os.strerror(ctypes.get_errno())}.")
    if tiles_allowed():
        raise AutopruneError("something in this process uses AMX already: hold it to an instruction set before that.")


def tiles_allowed() -> bool:
    """Whether this process may use AMX's tiles; asks for them."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILES) == 0)
