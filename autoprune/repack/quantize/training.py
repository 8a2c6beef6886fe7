"""`quantize_`: a model in anybody's training loop computes what `repack` will make of it in int8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments
from autoprune.model.copies import check_inputs, copy_for_inference
from autoprune.precision import OfLayer
from autoprune.quantization.fake import attach_, dequantize_
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.passes import simplify
from autoprune.repack.quantize.batches import batches_of
from autoprune.repack.quantize.precision import LayerPrecision, Settings, check_named
from autoprune.repack.quantize.trained import Modules, places_for


def quantize_(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any],
    *,
    precision: Literal["int8", "mixed"] | Mapping[str, OfLayer] = "int8",
) -> tuple[LayerPrecision, ...]:
    """Fake-quantises a model in place: from now on, in training and in eval mode, it computes as in int8.

    Its layers round what they read, and their weights, onto the grids of ``repack(model, precision="int8")``, which
    takes them from the model. What a program rounds differs in float32's last digits, after a GELU by up to 0.0002, so
    that now and then it takes the next step. Parameters keep their names and exact values: make the optimizer before
    or after, prune before, meanwhile or after. The grids are buffers of the state dict. A model that is fake-quantised
    already is calibrated anew. `autoprune.dequantize_` undoes it.

    Args:
        model: trained so far; its classes stay as they are, and so does its mode.
        example_inputs: as the model is called: a tensor, a tuple, a mapping or `Arguments`.
        calibration: batches of inputs, each as the model is called, from which the ranges of activations are found.
        precision: ``int8``: every layer that can be; ``mixed``: those that cost little of the output; or a
            mapping of layers, by name, to ``float32`` or ``int8``: a layer that it does not name is float32.

    Returns:
        What became of each layer, in the order they run. Layers without a Conv1d, Conv2d or Linear module of their own
        stay float32, such as those inside torch's MultiheadAttention, and those whose weight is computed from other
        tensors, as weight norm and torch's own pruning do.

    Raises:
        CaptureError: the model cannot be captured.
        AutopruneError: the calibration batches do not fit the model or are not finite.
    """
    copied = dequantize_(copy_for_inference(model).cpu())
    arguments = Arguments.of(example_inputs).ordered(copied)
    arguments = arguments.with_tensors([x.detach().cpu() for x in arguments.tensors])
    check_inputs(arguments.tensors)
    if isinstance(precision, str) and precision not in ("int8", "mixed"):
        raise AutopruneError(f"fake quantisation is int8 or mixed, or maps layers to theirs, not {precision!r}.")
    captured = capture(copied, arguments)
    graph = simplify(captured)
    modules = Modules.of(copied, arguments, captured, graph).that_round(model)
    check_named(copied, precision)
    chosen: Literal["int8", "mixed"] = "mixed" if precision == "mixed" else "int8"
    batches = batches_of(calibration, copied, arguments)
    grids, rows = places_for(graph, modules, batches, Settings(precision=chosen), precision)
    attach_(dequantize_(model), grids)
    return rows
