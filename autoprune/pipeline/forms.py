"""The forms of a model that the final table of a run times: dense in every engine, masked, and repacked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autoprune.evaluation.devices import Call, Candidate
from autoprune.latency.engines import ENGINES
from autoprune.pipeline import baselines
from autoprune.pipeline.preparation import Context, Prepared
from autoprune.precision import Precision, RunPrecision
from autoprune.repack import RepackedModel
from autoprune.repack.rivals import signal_to_noise_db
from autoprune.report.stored import CALLED, EAGER, MASKED, REPACKED, WHOLE


@dataclass(frozen=True)
class Form:
    """One form of the model in the final table.

    Attributes:
        candidate: what is timed; None where the device cannot time it.
        model: whose score it has; None for an engine that rounds, and can be called with these inputs alone.
        precision: of its products.
        exact: one inference of the float32 model that it was made of.
        inputs: of an inference of a repacked model.
    """

    candidate: Candidate | None
    model: nn.Module | None
    precision: str = "float32"
    exact: Call | None = None
    inputs: tuple[Any, ...] = ()

    def snr_db(self) -> float | None:
        """How far the error of its precision lies below its output, decibels; None in float32."""
        if self.exact is None or self.candidate is None or self.precision == "float32":
            return None
        given = self.inputs if isinstance(self.candidate, RepackedModel) else ()
        with torch.inference_mode():
            return signal_to_noise_db(self.candidate(*given), self.exact())


def forms_of(
    context: Context,
    prepared: Prepared,
    engines: baselines.DenseEngines,
    masked: nn.Module,
    repacked: RepackedModel,
) -> dict[str, Form]:
    """All forms by their row's name: torch eager, other dense engines, the masked model, the repacked one."""
    precision, dense, in_torch = context.config.precision, prepared.dense, context.device.runs_torch
    inputs = prepared.task.example_inputs(context.config.latency.batch)
    eager, dense_exact = engines.calls.get(baselines.EAGER), partial(dense, *inputs)
    forms = {EAGER: Form(eager, dense)}
    for name, call in engines.calls.items():
        if name == baselines.REPACKED:
            forms[WHOLE] = Form(call, engines.repacked, _made_in(precision, engines.repacked), dense_exact, inputs)
        elif name != baselines.EAGER:
            of = ENGINES.get(name).precision
            forms[f"dense, {name}"] = Form(call, dense if of == "float32" else None, of, dense_exact)
    made_in, masked_exact = _made_in(precision, repacked), partial(masked, *inputs)
    forms[MASKED] = Form(masked_exact if in_torch else None, masked)
    if in_torch:
        forms[CALLED] = Form(partial(repacked, *inputs), repacked, made_in, masked_exact)
    forms[REPACKED] = Form(repacked, repacked, made_in, masked_exact, inputs)
    return forms


def _made_in(precision: RunPrecision, model: RepackedModel) -> Precision:
    """What a table calls a model's precision, in a run of this precision."""
    if precision != "planned":
        return precision
    in_bytes = [row.precision == "int8" for row in model.report]
    return "int8" if in_bytes and all(in_bytes) else "mixed" if any(in_bytes) else "float32"
