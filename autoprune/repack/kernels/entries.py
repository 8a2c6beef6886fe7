"""The types of values' entries as LLVM IR: what they are in memory, how one becomes another, what two become."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.ir import F32, I8, I32, I64
from autoprune.repack.kernels.math import maximum, minimum


class Entry(Enum):
    """What an entry is, by torch's name of it."""

    FLOAT32 = "float32"
    INT64 = "int64"
    INT32 = "int32"
    UINT8 = "uint8"
    BOOL = "bool"  # a byte, 0 or 1

    @property
    def kind(self) -> ir.Type:
        """In memory and in registers."""
        kinds: Mapping[Entry, ir.Type] = {Entry.FLOAT32: F32, Entry.INT64: I64, Entry.INT32: I32}
        return kinds.get(self, I8)

    @property
    def signed(self) -> bool:
        """Whether a larger integer holds its sign."""
        return self in (Entry.INT64, Entry.INT32)

    @property
    def least(self) -> float:
        """No entry is less."""
        if self is Entry.FLOAT32:
            return -math.inf
        return -(2 ** (self.kind.width - 1)) if self.signed else 0

    @property
    def largest(self) -> float:
        """No entry is larger."""
        if self in (Entry.FLOAT32, Entry.BOOL):
            return math.inf if self is Entry.FLOAT32 else 1
        return int(2 ** (self.kind.width - self.signed)) - 1

    def constant(self, value: float, wide: int) -> ir.Constant:
        """A number in each of `wide` lanes."""
        one = ir.Constant(self.kind, float(value) if self is Entry.FLOAT32 else int(value))
        return one if wide == 1 else ir.Constant(ir.VectorType(self.kind, wide), [one] * wide)


def converted(b: ir.IRBuilder, value: ir.Value, given: Entry, wanted: Entry, wide: int) -> ir.Value:
    """`wide` entries as those of another type, as torch converts them; what does not fit an integer is not told."""
    if given is wanted:
        return value
    kind = wanted.kind if wide == 1 else ir.VectorType(wanted.kind, wide)
    if wanted is Entry.BOOL:
        return truth(b, value, given, wide)
    if given is Entry.FLOAT32:
        return b.fptosi(value, kind) if wanted.signed else b.fptoui(value, kind)
    if wanted is Entry.FLOAT32:
        return b.sitofp(value, kind) if given.signed else b.uitofp(value, kind)
    if wanted.kind.width <= given.kind.width:
        return value if wanted.kind.width == given.kind.width else b.trunc(value, kind)
    return b.sext(value, kind) if given.signed else b.zext(value, kind)


def truth(b: ir.IRBuilder, value: ir.Value, given: Entry, wide: int) -> ir.Value:
    """1 where an entry is not 0, NaN included, else 0: booleans."""
    return _byte(b, is_true(b, value, given, wide), wide)


def is_true(b: ir.IRBuilder, value: ir.Value, given: Entry, wide: int) -> ir.Value:
    """Bits of entries that are not 0."""
    zero = given.constant(0, wide)
    return b.fcmp_unordered("!=", value, zero) if given is Entry.FLOAT32 else b.icmp_signed("!=", value, zero)


def _byte(b: ir.IRBuilder, bits: ir.Value, wide: int) -> ir.Value:
    return b.zext(bits, I8 if wide == 1 else ir.VectorType(I8, wide))


Operation = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]


def _floor_divide(b: ir.IRBuilder, x: ir.Value, other: ir.Value) -> ir.Value:
    """Rounded down; `other` is above 0."""
    below = b.icmp_signed("<", b.srem(x, other), ir.Constant(x.type, None))
    return b.sub(b.sdiv(x, other), b.zext(below, x.type))


def _remainder(b: ir.IRBuilder, x: ir.Value, other: ir.Value) -> ir.Value:
    """0 or above; `other` is above 0."""
    rest = b.srem(x, other)
    return b.select(b.icmp_signed("<", rest, ir.Constant(x.type, None)), b.add(rest, other), rest)


def _ordered(sign: str) -> Operation:
    return lambda b, x, other: b.select(b.icmp_signed(sign, x, other), x, other)


_LOGIC: Mapping[str, Operation] = {
    "and": lambda b, x, other: b.and_(x, other),
    "or": lambda b, x, other: b.or_(x, other),
    "xor": lambda b, x, other: b.xor(x, other),
}
_FLOATS: Mapping[str, Operation] = {
    "add": lambda b, x, other: b.fadd(x, other),
    "sub": lambda b, x, other: b.fsub(x, other),
    "mul": lambda b, x, other: b.fmul(x, other),
    "div": lambda b, x, other: b.fdiv(x, other),
    "maximum": maximum,
    "minimum": minimum,
}
_INTEGERS: Mapping[str, Operation] = {
    **_LOGIC,
    "add": lambda b, x, other: b.add(x, other),
    "sub": lambda b, x, other: b.sub(x, other),
    "mul": lambda b, x, other: b.mul(x, other),
    "maximum": _ordered(">"),
    "minimum": _ordered("<"),
    "floor_divide": _floor_divide,
    "remainder": _remainder,
}
OPERATIONS: Mapping[Entry, Mapping[str, Operation]] = {
    Entry.FLOAT32: _FLOATS,
    Entry.INT64: _INTEGERS,
    Entry.INT32: _INTEGERS,
    Entry.UINT8: {},
    Entry.BOOL: {
        **_LOGIC,
        "add": _LOGIC["or"],
        "mul": _LOGIC["and"],
        "maximum": _LOGIC["or"],
        "minimum": _LOGIC["and"],
    },
}
"""How two entries of a type become one of the same type."""

COMPARISONS: Mapping[str, str] = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
"""How two entries of a type become a boolean."""


def compared(b: ir.IRBuilder, comparison: str, x: ir.Value, other: ir.Value, given: Entry, wide: int) -> ir.Value:
    """Booleans of two values of one type; NaN differs from all and is in no order."""
    sign = COMPARISONS[comparison]
    if given is Entry.FLOAT32:
        bits = (b.fcmp_unordered if sign == "!=" else b.fcmp_ordered)(sign, x, other)
    else:
        bits = (b.icmp_signed if given.signed else b.icmp_unsigned)(sign, x, other)
    return _byte(b, bits, wide)
