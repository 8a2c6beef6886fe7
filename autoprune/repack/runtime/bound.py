"""A program bound to tensors: what a call spends on its arguments and results is spent once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.model.copies import own_copy
from autoprune.repack.lowering.steps import TorchStep
from autoprune.repack.runtime.by_torch import TorchPlan
from autoprune.repack.runtime.program import Frame, Plan


class Bound:
    """Runs a program on the same tensors again and again, as ONNX Runtime's IO binding does.

    For a model that is called very often with little to do, such as a step of an LSTM: a call takes hardly longer than
    its work. Change `inputs` in place between two calls (``step.inputs[0].copy_(x)``). Only read what a call returns:
    results may share memory, and the next call overwrites them. Threads that share it take turns.

    Attributes:
        inputs: what is read, copies of the tensors it was made with.
    """

    def __init__(
        self,
        plan: Plan | TorchPlan,
        inputs: tuple[Tensor, ...],
        finish: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        self._lock, self._finish, self.inputs = threading.Lock(), finish, tuple(map(own_copy, inputs))
        self._places = [(x, x.data_ptr()) for x in self.inputs]
        self._by_torch = plan if isinstance(plan, TorchPlan) else None
        if isinstance(plan, Plan):
            self._prepare(plan)

    def _prepare(self, plan: Plan) -> None:
        self._plan = plan
        self._native = not any(isinstance(part, TorchStep) for part in plan.parts)
        with torch.inference_mode(False):  # or nobody could write to them outside of it
            first = plan.frame()
            plan.fill(first, self.inputs)
        self._outputs = {slot: first.holders[slot] for slot in plan.lowered.outputs}
        self._places += [(x, x.data_ptr()) for x in self._outputs.values()]
        self._frames = [(first, self._fixed(first))]

    def __call__(self) -> Any:
        """The model's outputs for what `inputs` hold now.

        Raises:
            AutopruneError: a bound tensor was given other memory, or holds a number that the program cannot look up.
        """
        with self._lock:
            for x, place in self._places:
                if x.data_ptr() != place:
                    raise AutopruneError("a bound tensor has other memory now: write to it with copy_, or bind anew.")
            if self._by_torch is not None:
                return self._finish(self._by_torch.run(self.inputs))
            (frame, results), plan = self._free(), self._plan
            plan.check_numbers(frame)
            plan.run_parts(frame)
            frame.let_go()
            return results if self._native else self._finish(plan.results(frame, shared=True))

    def _free(self) -> tuple[Frame, Any]:
        """A frame whose counters no helper of an earlier call looks at any more; with one thread, the first."""
        for each in self._frames:
            if each[0].free:
                return each
        frame = self._plan.frame()
        self._plan.fill(frame, self.inputs)
        for slot, y in self._outputs.items():
            frame.holders[slot], frame.slots[slot] = y, y.data_ptr()
        self._frames.append((frame, self._fixed(frame)))
        return self._frames[-1]

    def _fixed(self, frame: Frame) -> Any:
        """Its results, where they are the same tensors at every call: a step of torch makes new ones."""
        return self._finish(self._plan.results(frame, shared=True)) if self._native else None
