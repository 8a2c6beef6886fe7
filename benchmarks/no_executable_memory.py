"""Runs a program as under systemd's MemoryDenyWriteExecute=yes: ``python no_executable_memory.py FILE [ARGUMENT ...]``.

The libraries are loaded before: a process that was started so has loaded its own, too. Exits with 77 where the system
has no such filters.
"""

import ctypes
import errno
import os
import platform
import runpy
import struct
import sys

NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # of prctl
LOAD, AND, EQUAL, ANY, RETURN = 0x20, 0x54, 0x15, 0x45, 0x06  # of a packet filter, on 32-bit words
NUMBER, PROTECTION = 0, 32  # places: of the system call's number, of its third argument
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
WRITE, EXECUTE = 2, 4
CALLS = {"x86_64": (9, 10, 329), "aarch64": (222, 226, 288)}  # mmap, mprotect, pkey_mprotect


def refuse() -> None:
    """No memory of this process becomes executable any more, and none is mapped writable and executable."""
    if sys.platform != "linux" or platform.machine() not in CALLS:
        sys.exit(77)
    mmap, mprotect, pkey_mprotect = CALLS[platform.machine()]
    rows = [  # code, rows to skip if so, if not, operand
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 3, 0, mprotect),
        (EQUAL, 2, 0, pkey_mprotect),
        (EQUAL, 3, 0, mmap),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, PROTECTION),
        (ANY, 4, 3, EXECUTE),
        (LOAD, 0, 0, PROTECTION),
        (AND, 0, 0, WRITE | EXECUTE),
        (EQUAL, 1, 0, WRITE | EXECUTE),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rows), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    done = libc.prctl(NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero)
    if done or libc.prctl(SECCOMP, ctypes.c_ulong(FILTER), program, zero, zero):
        print(f"no filter: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(77)


if __name__ == "__main__":
    import autoprune.cli  # noqa: F401

    refuse()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
