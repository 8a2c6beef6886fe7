"""What the bytes of an object file are: code, read-only data."""

from __future__ import annotations

from collections.abc import Mapping

import llvmlite.binding as llvm

_DATA = (b".rodata", b".data", b"DATA")  # how sections of constants are called, in ELF and in WebAssembly


def section_sizes(code: bytes) -> Mapping[str, int]:
    """Bytes of an object file: ``object`` (all of it), ``code``, and ``data``, weights and all else that is read."""
    sizes = {"object": len(code), "code": 0, "data": 0}
    for section in llvm.ObjectFileRef.from_data(code).sections():
        name = section.name() or b""
        if section.is_text():
            sizes["code"] += section.size()
        elif name.startswith(_DATA) and not name.startswith(b"DATACOUNT"):
            sizes["data"] += section.size()
    return sizes
