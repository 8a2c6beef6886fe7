"""What torch's tracers switch for the whole process, kept to the thread that traces.

While torch.export or torch.compile works, torch replaces methods of every nn.Module and sets flags that all threads
read: a model that is served meanwhile would be traced as well. Two tracings at once undo each other's changes.
"""

from __future__ import annotations

import builtins
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
import torch.fx._symbolic_trace as symbolic
import torch.fx.config as config

from autoprune.errors import AutopruneError

# Torch's structured trace: it goes to a file where TORCH_TRACE asks for one, and takes its handler away at its first
# record where nothing does. Kept from that record, torch would describe every operator and guard, for nobody to read.
_TRACE = "torch.__trace"


class _Silence(threading.local, logging.Filter):
    """Whether torch's compilers are to be quiet in this thread; a filter of log records and of warnings."""

    on = False

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.on

    def match(self, text: str) -> bool:
        """As a warning filter's pattern."""
        return self.on


_SILENCE = _Silence()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's compilers quiet: they log and warn about their internals, of no use to anyone else."""
    before, _SILENCE.on = _SILENCE.on, True
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "torch" and name != _TRACE:
            for each in (logger, *logger.handlers):  # the handlers also serve loggers that torch makes later
                each.addFilter(_SILENCE)
    # Not catch_warnings, which would do the same to all threads.
    ignored: Any = ("ignore", _SILENCE, Warning, None, 0)
    warnings.filters.insert(0, ignored)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with suppress(ValueError):  # a thread that left its own catch_warnings took it along
            warnings.filters.remove(ignored)  # type: ignore[attr-defined]
        _SILENCE.on = before


class ByThread:
    """Stands for a flag of the process: `here` in the thread that makes it, until its `end`; what it was elsewhere."""

    def __init__(self, here: bool, elsewhere: Callable[[], object]) -> None:
        self._here, self._elsewhere = here, elsewhere
        self._thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return self._here if threading.get_ident() == self._thread else bool(self._elsewhere())

    def __or__(self, other: bool) -> bool:
        """As of a bool: models compute with what torch tells them."""
        return bool(self) | other

    def __and__(self, other: bool) -> bool:
        """Likewise."""
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__

    def end(self) -> None:
        """For those who hold it still: from now on it is what it was in all threads."""
        self._thread = None


@cache
def unloadable() -> str | None:
    """Why torch's compiler does not load, e.g. for want of a temporary folder; None when it does.

    It is tried once: what is loaded by half fails in other ways the second time.
    """
    try:
        importlib.import_module("torch._dynamo.convert_frame")
        importlib.import_module("torch.export._trace")
    except Exception as error:  # of whatever a module of torch does when it is loaded
        return f"torch's compiler does not load: {error}"
    return None


@contextmanager
def tracing() -> Iterator[None]:
    """For a block in which torch traces a model: quiet, one thread at a time, and without an effect on the others.

    Raises:
        AutopruneError: torch's compiler does not load.
    """
    if reason := unloadable():
        raise AutopruneError(reason)
    import torch._dynamo.convert_frame as dynamo  # here: torch's compiler takes long to load
    import torch.export._trace as export
    import torch.fx.graph_module as graph_module

    with dynamo.compile_lock, quiet(), ExitStack() as after:
        for owner, name, value in (
            (symbolic, "_is_fx_tracing_flag", _TRACED),
            (symbolic.Tracer, "trace", _trace),
            (symbolic, "_Patcher", _Patcher),
            # which nobody reads, and which takes up to a fifth of the time
            (config, "do_not_emit_stack_traces", True),
            (export, "_compiling_state_context", _exporting),
            # where they fail they write the whole model to stderr
            (export, "print", _print),
            (graph_module, "print", _print),
        ):
            after.enter_context(replaced(owner, name, value))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a module or class for a block, which is within `tracing`: other threads see it too."""
    there, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


class _Traced(threading.local):
    """Stands for torch's flag that a model is traced: whether one is in this thread."""

    on = False

    def __bool__(self) -> bool:
        return self.on


_TRACED = _Traced()
_own_trace = symbolic.Tracer.trace
# It sets the flag among its globals: here a copy of them, which nobody reads.
_trace_apart = FunctionType(
    _own_trace.__code__, dict(vars(symbolic)), "trace", _own_trace.__defaults__, _own_trace.__closure__
)


@wraps(_own_trace)
def _trace(*args: Any, **kwargs: Any) -> Any:
    """As torch's own, but other threads do not take themselves for traced."""
    before, _TRACED.on = _TRACED.on, True
    try:
        return _trace_apart(*args, **kwargs)
    finally:
        _TRACED.on = before


class _Patcher(symbolic._Patcher):
    """Replaces methods of nn.Module while a model is traced: here, for the tracing thread alone."""

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        thread, before = threading.get_ident(), getattr(cls, name)

        @wraps(new_fn)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if threading.get_ident() == thread else before)(*args, **kwargs)

        super().patch_method(cls, name, method, deduplicate)


@contextmanager
def _exporting() -> Iterator[None]:
    """As torch's own, but other threads do not take themselves for compiling and exporting."""
    compiling = ByThread(True, lambda: False)
    exporting = ByThread(True, lambda: False)
    with (
        replaced(torch.compiler, "_is_compiling_flag", compiling),
        replaced(torch.compiler, "_is_exporting_flag", exporting),
    ):
        yield


def _print(*args: Any, **kwargs: Any) -> None:
    if not _SILENCE.on:
        builtins.print(*args, **kwargs)
