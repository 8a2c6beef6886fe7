"""A training run on disk: one safetensors file, replaced after every epoch, that a killed run resumes from.

Everything is in one file (numbers as its metadata), so weights and epoch can never be of different moments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.files import read_tensors, write_tensors
from autoprune.quantization import attach_, grids_in
from autoprune.training.base import SparseTraining

VERSION = 1
_FILE = "training.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The live objects a checkpoint holds.

    Attributes:
        folder: where the file is kept.
        run: what the run is, as JSON values; only the same run resumes.
        model, optimizer, method, average: written after an epoch, overwritten when resuming.
    """

    folder: Path
    run: Mapping[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: SparseTraining | None
    average: nn.Module | None = None

    def save(self, losses: list[float]) -> None:
        """Writes the state after ``len(losses)`` epochs."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
            raise AutopruneError(f"this model cannot be checkpointed: {', '.join(odd)} of its state is not a tensor.")
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": v for key, v in values.items() if isinstance(v, Tensor)}
        if self.method is not None:
            tensors |= {f"method.{name}": value for name, value in self.method.state().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        about = {"version": VERSION, "losses": losses, "run": self.run}
        write_tensors(self.folder / _FILE, tensors, about)

    def load_(self, *, must_exist: bool = False) -> list[float]:
        """Restores the objects and returns the losses so far; an empty list when there is nothing to resume.

        Raises:
            FileError: the file is corrupt, was written by another run, or is missing where it must exist.
        """
        path = self.folder / _FILE
        if not must_exist and not path.exists():
            return []
        tensors, about = read_tensors(path, "the training checkpoint")
        losses = self._check(path, about)
        try:
            groups = self.optimizer.state_dict()["param_groups"]
            moments = self._moments(_under("optimizer", tensors))
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            held = _under("model", tensors)
            attach_(self.model, grids_in(held))
            self.model.load_state_dict(held)
            if self.average is not None:
                self.average.load_state_dict(_under("average", tensors))
            if self.method is not None:
                self.method.resume(_under("method", tensors))
        except (AutopruneError, RuntimeError, ValueError, TypeError, LookupError) as error:
            raise FileError(f"the training checkpoint {path} does not fit this model ({error}). Delete it.") from None
        return losses

    def _moments(self, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state by parameter; raises ValueError where it does not fit them, which torch finds later."""
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
            counts = key == "step" and value.numel() == 1 and value.is_floating_point() and float(value) >= 0
            own = parameters[int(index)] if 0 <= int(index) < len(parameters) else None
            if own is None or not (counts or (value.shape, value.dtype) == (own.shape, own.dtype)):
                raise ValueError(f"{name} of its optimizer does not fit its parameter")
        if len({frozenset(each) for each in state.values()}) > 1:
            raise ValueError("it has not the same of every parameter's optimizer state")
        return state

    def _check(self, path: Path, about: Mapping[str, Any]) -> list[float]:
        try:
            version, losses, run = about["version"], [float(loss) for loss in about["losses"]], dict(about["run"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the training checkpoint is corrupt: {path} ({error!r}). Delete it.") from None
        if version != VERSION:
            raise FileError(f"the training checkpoint {path} is of version {version}, not {VERSION}. Delete it.")
        here = json.loads(json.dumps(self.run))
        for name in sorted(here.keys() | run.keys()):
            if here.get(name) != run.get(name):
                raise FileError(
                    f"the training checkpoint {path} is of another run: its {name} is {run.get(name)!r}, "
                    f"here it is {here.get(name)!r}. Delete it, or name another folder."
                )
        return losses


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "."): v for name, v in tensors.items() if name.startswith(prefix + ".")}
