"""A layer's rows as least-squares fits: what the kept weights should be, and what cutting more of them costs.

The algebra of optimal brain surgeon (Hassibi and Stork 1993; Frantar and Alistarh 2022), with the inverse of what is
kept computed anew and not updated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autoprune.errors import NumericalError


@dataclass(frozen=True)
class LeastSquares:
    """For each row w of a layer: the mean of ``(y - w c)^2`` over inputs c, plus damping times ``|w - start|^2``.

    All tensors are float64. A group of a grouped convolution has inputs of its own.

    Attributes:
        start: the rows as they were, ``(conv_groups, out / conv_groups, columns)``.
        moments: mean of ``c c^T``, ``(conv_groups, columns, columns)``.
        cross: mean of ``y c^T``, in the shape of `start`.
        damping: over the mean of the moments' diagonal; > 0.
    """

    start: Tensor
    moments: Tensor
    cross: Tensor
    damping: float

    @cached_property
    def systems(self) -> Tensor:
        """The moments, damped."""
        return damped(self.moments, self.damping)

    def fitted(self, kept: Tensor) -> Tensor:
        """The best rows of which only `kept` differ from 0, in the shape of `start`.

        Raises:
            NumericalError: the inputs leave a system singular.
        """
        rows = self.start * kept
        missed = self.cross - rows @ self.moments
        for group, filters, at in supports(kept):
            wanted = missed[group][filters][:, at]
            rows[group, filters[:, None], at] += torch.cholesky_solve(wanted.T, self._factor(group, at)).T
        return rows

    def errors(self, kept: Tensor, cells: Tensor) -> Tensor:
        """What cutting a cell adds to the fit's error, for each row: shared out among the row's weights of the cell.

        Args:
            kept: what is not cut yet, in the shape of `start`.
            cells: the cell of each weight, likewise; weights of a cell are cut together.

        Returns:
            In that shape, >= 0; 0 where a weight is cut already.

        Raises:
            NumericalError: the inputs leave a system singular.
        """
        rows, errors = self.fitted(kept), torch.zeros_like(self.start)
        for group, filters, at in supports(kept):
            inverse = torch.cholesky_inverse(self._factor(group, at))
            own = cells[group][filters][:, at]
            parts, which = _parts(own).unique(dim=0, return_inverse=True)
            for index, part in enumerate(parts):
                alike = filters[which == index]
                errors[group, alike[:, None], at] = _cost(rows[group][alike][:, at], inverse, part)
        return errors

    def _factor(self, group: int, at: Tensor) -> Tensor:
        return factored(self.systems[group][at][:, at], self.damping)


def damped(moments: Tensor, damping: float) -> Tensor:
    """Moments ``(..., c, c)`` as float64, `damping` times the mean of the diagonal added to it."""
    moments = moments.double()
    extent = moments.shape[-1]
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return moments + damping * mean[..., None, None] * torch.eye(extent, dtype=torch.float64)


def factored(system: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of damped moments ``(..., c, c)``.

    Raises:
        NumericalError: there is none.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        raise NumericalError(
            "a layer's inputs on the calibration data are not finite, or too much alike for a damping of "
            f"{damping:g}: look for NaN and huge values in the data, or raise it."
        )
    return factor


def supports(kept: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows that keep the same positions, which share one system: their group, their numbers, the positions.

    Args:
        kept: bool, ``(conv_groups, rows, columns)``. Rows of which nothing is kept are left out.
    """
    for group, own in enumerate(kept):
        found, which = own.unique(dim=0, return_inverse=True)
        for index, support in enumerate(found):
            if bool(support.any()):
                yield group, (which == index).nonzero().flatten(), support.nonzero().flatten()


def _parts(cells: Tensor) -> Tensor:
    """Numbers from 0 for the cells of each row, in the order of the cells' own: rows parted alike become equal."""
    ordered, order = cells.sort(dim=1, stable=True)
    begins = torch.ones_like(ordered)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begins[:, :1] = 0
    return torch.empty_like(ordered).scatter_(1, order, begins.cumsum(1))


def _cost(rows: Tensor, inverse: Tensor, part: Tensor) -> Tensor:
    """``w_C^T ([H^-1]_CC)^-1 w_C`` of each cell C, divided by the weights that it has, in the shape of `rows`."""
    size = part.bincount()
    if int(size.max()) == 1:
        return rows.square() / inverse.diagonal()
    cost, order = torch.empty_like(rows), part.argsort(stable=True)
    ends = size.cumsum(0)
    for extent in size.unique().tolist():
        begins = (ends - size)[size == extent]
        at = order[begins[:, None] + torch.arange(extent)]  # (cells, extent)
        own = rows[:, at][..., None]  # (rows, cells, extent, 1)
        solved = torch.linalg.solve(inverse[at[:, :, None], at[:, None, :]], own)
        cost[:, at] = ((own * solved).sum(dim=(2, 3)) / extent)[..., None].expand(-1, -1, extent)
    return cost.clamp_(min=0.0)
