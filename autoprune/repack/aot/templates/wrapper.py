"""A model that autoprune built, called with numpy arrays. Needs numpy and the library beside this file alone."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

MODEL: dict[str, Any] = {}

Array = np.ndarray[Any, Any]
ALIGNMENT = 64  # bytes, of a workspace


class Model:
    """The model; several threads may call it at once, each of which gets workspaces of its own.

    Args:
        library: the shared library; the one beside this file when None.
        threads: that work on one call, 1 to the number that the model was built for; that number when None.

    Attributes:
        inputs: name, type and shape of each input, for every set of shapes that the model was built for.
        outputs: likewise of the outputs.
        threads: that work on one call.

    Raises:
        OSError: the library cannot be loaded here.
        ValueError: it is another build's, or there are too many threads.
    """

    def __init__(self, library: Path | str | None = None, *, threads: int | None = None) -> None:
        most = MODEL["threads"]
        self.threads = most if threads is None else threads
        if not 1 <= self.threads <= most:
            raise ValueError(f"threads must be 1 to {most}, as {MODEL['name']} was built for, not {threads}.")
        path = Path(__file__).with_name(MODEL["library"]) if library is None else Path(library)
        self._library = ctypes.CDLL(str(path.resolve()))
        self._local = threading.local()
        self.inputs = [call["inputs"] for call in MODEL["calls"]]
        self.outputs = [call["outputs"] for call in MODEL["calls"]]
        for call in MODEL["calls"]:
            if self._mark(f"{call['prefix']}_mark") != int(call["mark"], 16):
                raise ValueError(
                    f"{path.name} and {Path(__file__).name} are not of one build: put the files of one together, and "
                    "start Python anew, which keeps a library that it has loaded."
                )

    def __call__(self, *inputs: Array, **named: Array) -> Any:
        """Runs the model.

        Args:
            inputs: contiguous or not, in the model's order, of exactly its types and one of its sets of shapes.
            named: inputs by name, those that are not given by place.

        Returns:
            What the model returns: new arrays, in tuples, lists and dictionaries as the original has them.

        Raises:
            TypeError: too few or too many inputs, what is no array, or another type.
            ValueError: shapes that the model was not built for, or a number that is no row's of a table.
        """
        given = self._in_order(inputs, named)
        number = self._number_of(given)
        call = MODEL["calls"][number]
        held = [np.require(x, requirements=["C", "ALIGNED"]) for x in given]
        results = [np.empty(port["shape"], port["type"]) for port in call["outputs"]]
        workspace = self._workspace(number)
        tensors = [ctypes.c_void_p(x.ctypes.data) for x in (*held, *results, workspace)]
        if self.threads == 1:
            self._check(getattr(self._library, f"{call['prefix']}_run")(*tensors))
        else:
            self._run_parts(getattr(self._library, f"{call['prefix']}_run_part"), tensors)
        return _structured(call["returns"], results)

    def _in_order(self, inputs: tuple[Array, ...], named: dict[str, Array]) -> list[Array]:
        ports = self.inputs[0]
        names = [port["name"] for port in ports]
        free = names[len(inputs) :]
        if len(inputs) > len(names) or sorted(named) != sorted(free):
            given_were = f"{len(inputs)} in order and {list(named)} by name"
            raise TypeError(f"{MODEL['name']} takes {', '.join(names)}; given were {given_were}.")
        given = [*inputs, *(named[name] for name in free)]
        for port, x in zip(ports, given, strict=True):
            if not isinstance(x, np.ndarray):
                raise TypeError(f"{port['name']} must be a numpy array, not {type(x).__name__}.")
            if x.dtype != np.dtype(port["type"]):
                kind = port["type"]
                raise TypeError(f"{port['name']} must be {kind}, not {x.dtype}: pass it as .astype({kind!r}).")
        return given

    def _number_of(self, given: list[Array]) -> int:
        shapes = [list(x.shape) for x in given]
        built = [[port["shape"] for port in ports] for ports in self.inputs]
        if shapes in built:
            return built.index(shapes)
        text = " or ".join(_shapes_text(each) for each in built)
        raise ValueError(f"{MODEL['name']} was built for shapes {text}, not {_shapes_text(shapes)}.")

    def _workspace(self, number: int) -> Array:
        """This thread's, prepared."""
        held: dict[int, Array] = self._local.__dict__.setdefault("workspaces", {})
        if number not in held:
            call = MODEL["calls"][number]
            memory = np.empty(call["workspace_bytes"] + ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT
            workspace = memory[start : start + call["workspace_bytes"]]
            prepare = getattr(self._library, f"{call['prefix']}_prepare")
            self._check(prepare(ctypes.c_void_p(workspace.ctypes.data)))
            held[number] = workspace
        return held[number]

    def _run_parts(self, run_part: Callable[..., int], tensors: list[ctypes.c_void_p]) -> None:
        """Every part on a thread: they wait for each other, so that each calling thread has helpers of its own."""
        held = self._local.__dict__
        if "helpers" not in held:
            held["helpers"] = ThreadPoolExecutor(self.threads - 1)
        idle = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
        others = [held["helpers"].submit(run_part, *tensors, n, self.threads, idle) for n in range(1, self.threads)]
        first = run_part(*tensors, 0, self.threads, idle)
        for status in [first, *(other.result() for other in others)]:
            self._check(status)

    def _mark(self, name: str) -> int | None:
        """What the library says of its build; None where it has no such call."""
        try:
            return ctypes.c_uint64.in_dll(self._library, name).value
        except ValueError:
            return None

    def _check(self, status: int) -> None:
        if status:
            raise ValueError(f"{MODEL['name']}: {MODEL['statuses'][str(status)]}.")


def _structured(returns: Any, results: list[Array]) -> Any:
    """The results in the places of their numbers."""
    if not isinstance(returns, dict):
        return returns
    ((tag, content),) = returns.items()
    if tag == "output":
        return results[content]
    if tag == "text":
        return content
    if tag in ("tuple", "list"):
        each = [_structured(inner, results) for inner in content]
        return tuple(each) if tag == "tuple" else each
    return {key: _structured(inner, results) for key, inner in content}


def _shapes_text(shapes: Iterable[Iterable[int]]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)
