"""Digests of plain parts and of tensors, and the names of code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoprune.identity.state import LONGEST

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def digest(*parts: str | bytes | memoryview) -> str:
    """A text of fixed length that tells `parts` from any others."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(f"{len(raw)}:".encode())
        sha.update(raw)
    return sha.hexdigest()[:24]


def tensor_fingerprint(tensor: Tensor) -> str:
    """Of its type, shape and values."""
    tensor = tensor.detach()
    kind = f"{tensor.dtype} {tensor.layout}"
    if tensor.is_nested:
        return digest(kind, *(tensor_fingerprint(part) for part in tensor.unbind()))
    shape = str(tuple(tensor.shape))
    if tensor.is_meta:
        return digest("meta", kind, shape)
    plain = tensor.dequantize() if tensor.is_quantized else tensor
    plain = plain if plain.layout is torch.strided else plain.to_dense()
    values = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return digest(kind, shape, values.numpy().data)


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text or the like, or a tuple of such."""
    return type(value) in PLAIN or (type(value) is tuple and all(map(is_plain, value)))


def ends_of(entries: Sequence[Any]) -> Sequence[Any]:
    """All entries, or of a long sequence as many from either end as are read."""
    return entries if len(entries) <= 2 * LONGEST else [*entries[:LONGEST], *entries[-LONGEST:]]


def name_of(value: Any) -> str:
    """Module and qualified name of a class or function; of another object, its type's."""
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def code_name(function: Any) -> str:
    """Module and qualified name that a function's code was compiled with."""
    return f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"
