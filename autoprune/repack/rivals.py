"""The dense engines that compute what a model computes; any other would be compared with for other work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoprune.errors import AutopruneError
from autoprune.latency.engines import ENGINES
from autoprune.latency.engines.base import Call, EnginePrecision
from autoprune.latency.engines.export import Exported, OnnxEngine
from autoprune.model.copies import copy_for_inference, not_running
from autoprune.repack.outputs import difference, noise_of, same_output
from autoprune.repack.probes import fresh

ROUNDED: Mapping[EnginePrecision, float] = {"float32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""How far from the model's largest value an engine's rounding may lead: what is further off computes something else.
How close it is, which is the model's matter in int8, is for `signal_to_noise_db`."""


def dense_calls(
    model: nn.Module,
    inputs: tuple[Any, ...],
    threads: int,
    engines: Sequence[str],
    done: Callable[[str], object] = lambda name: None,
    calibration: Sequence[tuple[Any, ...]] | None = None,
) -> tuple[dict[str, Call], dict[str, str]]:
    """Those of `engines` that compute what the model computes in torch; the others, and why they are left out.

    Args:
        model: left as it is.
        inputs: a copy for each engine is kept.
        threads: of one inference.
        engines: rows of ENGINES.
        done: told each engine when it is prepared or left out.
        calibration: of engines in int8: batches of inputs of the same shapes; `inputs` alone when None.

    Raises:
        AutopruneError: the model itself does not run.
    """
    model = copy_for_inference(model)
    try:
        with torch.inference_mode():
            wanted = model(*fresh(inputs))
    except Exception as error:  # the model is the user's: it may raise anything
        raise not_running(error) from error
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    with Exported(model, fresh(inputs)) as exported:
        for name in engines:
            engine = ENGINES.get(name)()
            try:
                if isinstance(engine, OnnxEngine):
                    call = engine.prepare_from(exported, fresh(inputs), threads)
                else:
                    call = engine.prepare(model, fresh(inputs), threads, calibration)
                with engine.reasons():
                    outputs = call()
                if why := _wrong(outputs, wanted, ROUNDED[engine.precision]):
                    left_out[name] = f"it computes something else than the model, which is wrong: {why}."
                else:
                    calls[name] = call
            except AutopruneError as error:
                left_out[name] = str(error)
            done(name)
    return calls, left_out


def arrays_as_tensors(outputs: Sequence[Any]) -> list[Tensor]:
    """Copies of an ONNX engine's outputs, which its next call may overwrite."""
    return [torch.from_numpy(np.array(each)) for each in outputs]


def signal_to_noise_db(outputs: Any, wanted: Any) -> float:
    """How close an engine's outputs are to the model's.

    Args:
        outputs: of an engine, in its own form.
        wanted: the model's in torch eager, in float32.

    Returns:
        Of the output that is furthest off: its mean square by that of its error, in dB. Infinite where there is no
        error; minus infinity where an output has another shape or holds a NaN.
    """
    right = [x for x in pytree.tree_leaves(wanted) if isinstance(x, Tensor)]
    if isinstance(outputs, (tuple, list)) and all(isinstance(x, np.ndarray) for x in outputs):
        got = arrays_as_tensors(outputs)
    else:
        got = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    noise = noise_of(got, right)
    return math.inf if noise == 0 else -20 * math.log10(noise) if noise < math.inf else -math.inf


def _wrong(outputs: Any, wanted: Any, tolerance: float) -> str:
    """How an engine's outputs differ from the model's; empty when they do not."""
    leaves = [x for x in pytree.tree_leaves(wanted) if isinstance(x, Tensor)]
    if isinstance(outputs, (tuple, list)) and all(isinstance(x, np.ndarray) for x in outputs):
        return difference(arrays_as_tensors(outputs), leaves, tolerance)
    if same_output(outputs, wanted, tolerance):
        return ""
    got = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    return difference(got, leaves, tolerance) or "its outputs differ"
