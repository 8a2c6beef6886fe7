"""What a built model is, as plain data: for its callers in other languages, and for whoever finds the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from autoprune.repack.aot.build import Compiled
from autoprune.repack.aot.call import Call, Status
from autoprune.repack.aot.interface import Port
from autoprune.repack.graph.ir import renamed
from autoprune.version import __version__

MEANINGS: Mapping[Status, str] = {
    Status.OK: "all is well",
    Status.NULL_POINTER: "a pointer is null",
    Status.MISALIGNED: "a tensor or the workspace lies at an address that is no multiple of its alignment",
    Status.NOT_PREPARED: "the workspace is not prepared for this call",
    Status.OUT_OF_RANGE: "a number, of an input or computed on the way, is no row of the table that it is looked up in",
    Status.WRONG_PART: "there is no such part, or there are more parts than the model was built for",
    Status.WRONG_COUNT: "the model has another number of inputs or outputs",
    Status.WRONG_TYPE: "a tensor is of another type",
    Status.WRONG_RANK: "a tensor has another number of axes",
    Status.WRONG_SHAPE: "a tensor has other extents",
    Status.TOO_SMALL: "the memory of a tensor or the workspace is too small",
}
"""Status -> what it means, as the half of a sentence."""


def interface(built: Compiled, outputs: Any) -> dict[str, Any]:
    """How a built model is called.

    Args:
        built: the model.
        outputs: what its program returns, as `Graph.outputs`.
    """
    return {
        "name": built.name,
        "threads": built.calls[0].threads,
        "calls": [_call(call, mark, outputs) for call, mark in zip(built.calls, built.marks, strict=True)],
        "statuses": {str(int(status)): MEANINGS[status] for status in Status},
    }


def description(built: Compiled, target: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What else is told of a build; no path of the machine that made it.

    Args:
        built: the model.
        target: as it was asked for.
        sizes: of the object file, by what takes the bytes.
    """
    processor = built.platform.target
    return {
        "target": target,
        "triple": processor.triple,
        "cpu": processor.cpu,
        "features": processor.features,
        "sizes": dict(sizes),
        "versions": {
            "autoprune": __version__,
            "llvmlite": llvmlite.__version__,
            "llvm": ".".join(map(str, llvm.llvm_version_info)),
        },
    }


def _call(call: Call, mark: int, outputs: Any) -> dict[str, Any]:
    leaves = {name: {"output": number} for number, name in enumerate(each.name for each in call.outputs)}
    return {
        "prefix": call.prefix,
        "mark": f"{mark:016x}",
        "workspace_bytes": call.workspace_bytes,
        "inputs": [_port(each) for each in call.inputs],
        "outputs": [_port(each.port) for each in call.outputs],
        "returns": renamed(outputs, {**call.lowered.scalars, **leaves}),
    }


def _port(port: Port) -> dict[str, Any]:
    return {
        "name": port.name,
        "type": port.dtype,
        "shape": list(port.shape),
        "count": port.count,
        "bytes": port.bytes,
    }
