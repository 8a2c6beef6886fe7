"""Built models on every processor: ``python -m tests.emulated``. Ends with 1 where one computes something else.

Each model is built for every target, and its program run natively, under qemu or in wasmtime. What it computes is
compared with the repacked model, and bit for bit with what the other processors compute: those that multiply and add
with one rounding among each other, those that do not, and of models of bytes all of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoprune.repack.aot.build import compiled
from autoprune.repack.aot.targets import HOST, PLATFORMS, platform
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.report import ProgramModel
from autoprune.repack.tuning.tuning import TuningCache
from autoprune.report.table import markdown_table
from benchmarks.build_models import SUBJECTS, Subject
from benchmarks.build_programs import call, runs
from tests.laws.test_program import told

CLOSE = 1e-5  # of the largest output, float32


@dataclass(frozen=True)
class Found:
    """What a model computes on a target; `error` is relative to the largest output of the repacked one."""

    outputs: list[Tensor]
    error: float
    same: bool


def bits(outputs: Sequence[Tensor]) -> tuple[bytes, ...]:
    return tuple(each.contiguous().numpy().tobytes() for each in outputs)


def on(target: str, fast: ProgramModel, subject: Subject, wanted: list[Tensor]) -> Found | str:
    """What a model computes on a target; or why that is not known."""
    how = runs(platform(target))
    if isinstance(how, str):
        return how
    with tempfile.TemporaryDirectory() as folder:
        outputs = call(compiled(fast, target), subject.given(), Path(folder), how)
    error = max(float((one - two).abs().max() / two.abs().max()) for one, two in zip(outputs, wanted, strict=True))
    return Found(outputs, error, bits(outputs) == bits(wanted))


def fused(target: str) -> bool:
    return platform(target).target.fused


def emulated(target: str) -> bool:
    return platform(target).is_wasm or bool(platform(target).emulator)


def check(name: str, targets: Sequence[str], cache: TuningCache) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and what is wrong."""
    subject, rows, wrong = SUBJECTS[name], [], []
    fast = subject.repacked(cache=cache)
    with torch.inference_mode():
        output = fast(*subject.given())
    wanted = [output] if isinstance(output, Tensor) else list(output)
    groups: dict[bool, dict[tuple[bytes, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for target in targets:
        found = on(target, fast, subject, wanted)
        if isinstance(found, str):
            rows.append([name, target, "", "", f"not run: {found}"])
            continue
        exact = subject.precision == "int8"
        groups[exact or fused(target)][bits(found.outputs)].append(target)
        limit = 0.0 if exact or target == HOST else CLOSE
        if not found.error <= limit:
            wrong.append(f"{name} on {target}: an error of {found.error:.1e}")
        if target == HOST and not found.same:
            wrong.append(f"{name}: the built model has other bits than the repacked one")
        rows.append(
            [name, target, "yes" if fused(target) else "no", f"{found.error:.1e}", "yes" if found.same else "no"]
        )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    for kind in groups.values():
        if len(kind) > 1:
            wrong.append(f"{name} differs: " + " / ".join(", ".join(each) for each in kind.values()))
    return rows, wrong


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulated", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--targets", nargs="+", choices=[HOST, *PLATFORMS], default=[HOST, *PLATFORMS])
    parser.add_argument("--strict", action="store_true", help="fail where one cannot be run that can be emulated")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            found, differs = check(name, args.targets, told(Path(folder), Tiling))  # no time is measured
            rows += found
            wrong += differs
    print(markdown_table(["model", "target", "fuses", "error", "bits of the repacked model"], rows))
    if args.strict:
        missing = [row for row in rows if row[-1].startswith("not run") and emulated(row[1])]
        wrong += [f"{row[0]} on {row[1]} was {row[-1]}" for row in missing]
    print("\n".join(wrong) or "All is as it should be.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
