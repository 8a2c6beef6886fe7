"""The forms of a model that the final table of a run times: dense in every engine, masked, and repacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from autoprune.latency.engines import ENGINES
from autoprune.latency.timer import torch_threads
from autoprune.pipeline import baselines
from autoprune.pipeline.preparation import Context, Prepared
from autoprune.precision import Precision, RunPrecision
from autoprune.repack import RepackedModel
from autoprune.repack.rivals import signal_to_noise_db
from autoprune.report.stored import CALLED, EAGER, MASKED, REPACKED, WHOLE

Call = Callable[[], object]


@dataclass(frozen=True)
class Form:
    """One form of the model in the final table.

    Attributes:
        call: one inference.
        model: whose score it has; None for an engine that rounds, and can be called with these inputs alone.
        precision: of its products.
        exact: one inference of the float32 model that it was made of.
    """

    call: Call
    model: nn.Module | None
    precision: str = "float32"
    exact: Call | None = None

    def snr_db(self) -> float | None:
        """How far the error of its precision lies below its output, decibels; None in float32."""
        if self.exact is None or self.precision == "float32":
            return None
        with torch.inference_mode():
            return signal_to_noise_db(self.call(), self.exact())


def forms_of(
    context: Context,
    prepared: Prepared,
    engines: baselines.DenseEngines,
    masked: nn.Module,
    repacked: RepackedModel,
) -> dict[str, Form]:
    """All that is timed, by its row's name: torch eager, other dense engines, the masked model, the repacked one."""
    latency, precision, dense = context.config.latency, context.config.precision, prepared.dense
    inputs, eager = prepared.task.example_inputs(latency.batch), engines.calls[baselines.EAGER]
    forms = {EAGER: Form(eager, dense)}
    for name, call in engines.calls.items():
        if name == baselines.REPACKED:
            forms[WHOLE] = Form(call, engines.repacked, _made_in(precision, engines.repacked), eager)
        elif name != baselines.EAGER:
            of = ENGINES.get(name).precision
            forms[f"dense, {name}"] = Form(call, dense if of == "float32" else None, of, eager)
    forms[MASKED] = Form(partial(masked, *inputs), masked)
    forms[CALLED] = Form(partial(repacked, *inputs), repacked, _made_in(precision, repacked), forms[MASKED].call)
    with torch_threads(latency.threads):
        forms[REPACKED] = replace(forms[CALLED], call=repacked.bound_call(*inputs))
    return forms


def _made_in(precision: RunPrecision, model: RepackedModel) -> Precision:
    """What a table calls a model's precision, in a run of this precision."""
    if precision != "planned":
        return precision
    in_bytes = [row.precision == "int8" for row in model.report]
    return "int8" if in_bytes and all(in_bytes) else "mixed" if any(in_bytes) else "float32"
