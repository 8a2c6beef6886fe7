"""What a masked model's layer reads and what the dense model's gives, summed over calibration batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, NumericalError
from autoprune.masks import Batches
from autoprune.model.arguments import call_with
from autoprune.model.columns import input_columns, joined, output_rows
from autoprune.model.given import called, read_calibration
from autoprune.model.inventory import eval_mode
from autoprune.model.uses import Use, watch_weights


@dataclass(frozen=True)
class LayerSums:
    """Means over all samples and positions, float64; c are the columns that the masked model's layer reads.

    Attributes:
        moments: of ``c c^T``, ``(conv_groups, columns, columns)``.
        cross: of ``y c^T``, y being the dense model's output, bias left out: ``(conv_groups, out / conv_groups,
            columns)``.
        inputs: of c, ``(conv_groups, columns, 1)``.
        outputs: of y, ``(conv_groups, out / conv_groups, 1)``.
        power: of y^2, likewise.
        count: of samples and positions that these are means over.
        turned: whether the parameter holds the weight the other way round.
        biased: whether a bias was added to the product every time.
    """

    moments: Tensor
    cross: Tensor
    inputs: Tensor
    outputs: Tensor
    power: Tensor
    count: int
    turned: bool
    biased: bool

    @property
    def centred(self) -> LayerSums:
        """The same of c and y less their means: what a fit sees whose bias makes up for these."""
        return replace(
            self,
            moments=self.moments - self.inputs @ self.inputs.transpose(1, 2),
            cross=self.cross - self.outputs @ self.inputs.transpose(1, 2),
            power=self.power - self.outputs.square(),
        )


def layer_sums(model: nn.Module, dense: nn.Module, name: str, batches: Batches) -> LayerSums:
    """Runs both models on the batches, in eval mode.

    Args:
        model: masked; its other layers feed this one.
        dense: the model to follow.
        name: of the layer.
        batches: to run both on; their targets are not read.

    Raises:
        AutopruneError: the batches never reach the layer, or the two models use it differently.
        GivenError: a batch cannot be read, or a model does not run on it.
        NumericalError: the layer reads, or gives, what is not finite.
    """
    totals: list[Tensor] = []
    count, turned, biased = 0, False, True
    for number, inputs, _ in read_calibration(batches):
        with called(f"the model does not run on batch {number} of the calibration data"):
            own, others = uses_of(model, name, inputs), uses_of(dense, name, inputs)
        if len(own) != len(others):
            raise AutopruneError(
                f"{name} runs {len(own)} times in the pruned model and {len(others)} times in the dense one on batch "
                f"{number} of the calibration data: how often it runs hangs on values. Keep it dense (keep_dense)."
            )
        for use, wanted in zip(own, others, strict=True):
            if use.output.shape != wanted.output.shape:
                raise AutopruneError(
                    f"{name} gives {tuple(use.output.shape)} in the pruned model and {tuple(wanted.output.shape)} in "
                    f"the dense one on batch {number} of the calibration data: what it is given hangs on values. Keep "
                    "it dense (keep_dense)."
                )
            turned, biased = use.turned, biased and wanted.bias is not None
            for part, seen in _parts(use, wanted):
                totals = [total + new for total, new in zip(totals, part, strict=True)] if totals else part
                count += seen
    if not count:
        raise AutopruneError(f"calibration never reached {name}: give batches that run the whole model.")
    if not all(bool(torch.isfinite(total).all()) for total in totals):
        raise NumericalError(
            f"{name} reads or gives values that are not finite on the calibration data: look for NaN, infinity or huge "
            "values in the data, and whether the dense model is sound."
        )
    moments, cross, inputs, outputs, power = (total / count for total in totals)
    return LayerSums(moments, cross, inputs, outputs, power, count, turned, biased)


def _parts(use: Use, wanted: Use) -> list[tuple[list[Tensor], int]]:
    """The sums of one use, some samples at a time, and over how many positions each goes."""
    rows, done, found = output_rows(use, wanted.output), 0, []
    if wanted.bias is not None:
        rows = rows - wanted.bias.detach().reshape(use.conv_groups, -1, 1)
    for part in input_columns(use, use.x):
        c, y = joined(part).double(), joined(rows[done : done + len(part)]).double()
        done += len(part)
        sums = [c @ c.transpose(1, 2), y @ c.transpose(1, 2)]
        sums += [values.sum(dim=2, keepdim=True) for values in (c, y, y.square())]
        found.append((sums, c.shape[2]))
    return found


def uses_of(model: nn.Module, name: str, inputs: Any) -> list[Use]:
    """Every use of a layer's weight when the model runs in eval mode."""
    uses: list[Use] = []

    def seen(_: str, use: Use) -> None:
        uses.append(replace(use, x=use.x.clone(), output=use.output.clone()))  # what follows may work in place

    with eval_mode(model), watch_weights(model, [name], seen), torch.no_grad():
        call_with(model, inputs)
    return uses
