"""Which models are made functional the long way, by torch, and which are functional as they are exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.repack.graph import torch_export
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.torch_export import CaptureError


class Call(nn.Module):
    """A function of a convolution and an input as a module."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv, x)


DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _dropped(function: Any, *, training: bool = False, inplace: bool = True) -> Callable[[nn.Module, Tensor], Any]:
    def run(conv: nn.Module, x: Tensor) -> Tensor:
        y = conv(x).mean(-1) if function is F.dropout1d else conv(x)[:, :, None] if function is F.dropout3d else conv(x)
        dropped: Tensor = function(y, 0.5, training, inplace)
        return dropped * 2

    return run


def _written(function: Callable[[Tensor], Tensor], **more: bool) -> Callable[[nn.Module, Tensor], Any]:
    def run(conv: nn.Module, x: Tensor) -> Any:
        y = conv(x)
        z = function(y).add_(1)
        return (y, z) if more.get("both") else z

    return run


SHORT: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    **{f"{each.__name__} in place": _dropped(each) for each in DROPOUTS},
    **{each.__name__: _dropped(each, inplace=False) for each in DROPOUTS},
    "dropout of the input": lambda conv, x: conv(F.dropout(x, 0.5, training=False, inplace=True))[:, :3] + x,
    "a literal": lambda conv, x: conv(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None],
    "all of a tensor": _written(lambda y: y[:, :4]),
    "a part of a tensor": _written(lambda y: y[:, 1:3]),
    "turned": _written(lambda y: y.flatten(1).view(-1, 4, 36).transpose(1, 2)),
}
LONG: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a part of a tensor that is read": _written(lambda y: y[:, 1:3], both=True),
    "dropped out, and read": _written(lambda y: F.dropout(y, 0.5, training=False, inplace=True), both=True),
}


def _check(function: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x, other = Call(function).eval(), torch.randn(1, 3, 6, 6), torch.randn(5, 3, 6, 6)
    graph = capture(model, (x,))
    for given in (x, other):
        wanted = model(given.clone())
        torch.testing.assert_close(reference(graph, (given,)), wanted)


@pytest.mark.parametrize("name", SHORT)
def test_what_writes_where_nobody_looks_is_not_traced_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        raise CaptureError("traced again")

    monkeypatch.setattr(torch_export, "functional", functional)
    _check(SHORT[name])


@pytest.mark.parametrize("name", LONG)
def test_what_is_written_is_seen(name: str) -> None:
    _check(LONG[name])


@pytest.mark.parametrize("function", DROPOUTS)
def test_a_dropout_that_draws_is_refused(function: Any) -> None:
    with pytest.raises(CaptureError, match="which a program cannot"):
        capture(Call(_dropped(function, training=True)).eval(), (torch.randn(1, 3, 6, 6),))


def test_an_input_that_is_written_behind_a_dropout_is_refused() -> None:
    def run(conv: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = F.relu(F.dropout(x, 0.5, training=False, inplace=True), inplace=True) + conv(x)[:, :3]
        return y

    with pytest.raises(CaptureError, match="writes to its inputs"):
        capture(Call(run).eval(), (torch.randn(1, 3, 6, 6),))
