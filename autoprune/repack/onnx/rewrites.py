"""Operators that torch's ONNX exporter or an engine gets wrong, written with others that every engine computes rightly.

Each function has its operator's arguments and returns NotImplemented for those that need no other form. What is still
wrong in an engine, the comparison with the model tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

_aten = torch.ops.aten
MAX_POOLS = {1: _aten.max_pool1d.default, 2: _aten.max_pool2d.default, 3: _aten.max_pool3d.default}
DROPPED = 1e-8  # the largest number that the exporter takes for 0
SCALE = 2.0**40
AVG_POOLS = {1: _aten.avg_pool1d.default, 2: _aten.avg_pool2d.default, 3: _aten.avg_pool3d.default}


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _borders(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool
) -> list[tuple[int, int]] | None:
    """What is added before and after each axis so that a pool that pads and rounds nothing has the same windows.

    OpenVINO keeps a last window that lies in the padding alone, and divides by another count at the edge.
    """
    found = []
    sizes: Sequence[Any] = x.shape[-len(kernel) :]
    for size, k, s, p in zip(sizes, kernel, stride, padding, strict=True):
        if not isinstance(size, int):  # any extent
            return None
        windows = (size + 2 * p - k + (s - 1 if ceil else 0)) // s + 1
        windows -= ceil and (windows - 1) * s >= size + p  # it would begin in the padding
        found.append((p, max(0, (windows - 1) * s + k - size - p)))
    return found


def _padded(x: Tensor, borders: Sequence[tuple[int, int]], value: float) -> Tensor:
    pads = [amount for border in reversed(borders) for amount in border]
    return functional.pad(x, pads, value=value) if any(pads) else x


def _max_pool(axes: int) -> Callable[..., Any]:
    def rewrite(
        x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Any:
        kernel, padding, dilation = (_each(value, axes) for value in (kernel, padding, dilation))
        steps = _each(stride, axes) or kernel
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        borders = _borders(x, spans, steps, padding, ceil_mode) if ceil_mode and x.is_floating_point() else None
        if borders is None:
            return NotImplemented
        return MAX_POOLS[axes](_padded(x, borders, -math.inf), kernel, steps, [0] * axes, dilation)

    return rewrite


def _avg_pool(axes: int) -> Callable[..., Any]:
    def rewrite(
        x: Tensor,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        kernel, padding = _each(kernel, axes), _each(padding, axes)
        steps = _each(stride, axes) or kernel
        borders = _borders(x, kernel, steps, padding, ceil_mode) if ceil_mode or divisor_override else None
        if borders is None:
            return NotImplemented
        pooled = AVG_POOLS[axes](_padded(x, borders, 0.0), kernel, steps)
        if divisor_override:  # torch's exporter drops it
            return pooled * (math.prod(kernel) / divisor_override)
        ones = x.new_ones((*(1,) * (x.ndim - axes), *x.shape[-axes:]))  # where it is 0, a value does not count
        if count_include_pad:
            ones = _padded(ones, [(p, min(p, after)) for p, (_, after) in zip(padding, borders, strict=True)], 1.0)
            borders = [(0, max(0, after - p)) for p, (_, after) in zip(padding, borders, strict=True)]
        return pooled / AVG_POOLS[axes](_padded(ones, borders, 0.0), kernel, steps)

    return rewrite


def _add(x: Any, other: Any, *, alpha: float = 1) -> Any:
    """The exporter drops ``+ 1e-12``, which keeps a logarithm or a quotient finite: scaled, it is exact and stays."""
    if not isinstance(other, float) or not 0.0 < abs(other * alpha) <= DROPPED or x.dtype != torch.float32:
        return NotImplemented
    return (x * SCALE + other * alpha * SCALE) * (1.0 / SCALE)


def _log_sigmoid(x: Tensor) -> Tensor:
    """The exporter writes Log(Sigmoid(x)), and float32 sigmoids end in 0; ONNX has no log1p either."""
    e = torch.exp(-x.abs())
    return x.clamp(max=0.0) - torch.where(e < 0.02, e * (1.0 - e * (0.5 - e / 3.0)), torch.log(1.0 + e))


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """OpenVINO has no circular padding."""
    if mode != "circular" or min(pad) < 0:
        return NotImplemented
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        size = x.shape[-axis]
        parts = [x.narrow(-axis, size - before, before), x, x.narrow(-axis, 0, after)]
        x = torch.cat([part for part, there in zip(parts, (before, True, after), strict=True) if there], -axis)
    return x


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """A row that is masked whole is zeros in torch; as a softmax it would be the mean of all values."""
    if attn_mask is None or dropout_p or is_causal or enable_gqa:
        return NotImplemented
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not allowed:
        scores = scores + attn_mask
    weights = torch.where(allowed, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.where(allowed, weights, 0.0) @ value


def _linear(x: Tensor) -> Tensor:
    return (1.0 - x).clamp(min=0.0)


def _cubic(x: Tensor) -> Tensor:
    near, far = (1.5 * x - 2.5) * x * x + 1.0, ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _antialiased(kernel: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """OpenVINO ignores `antialias`. Resizing is linear along either axis, so it is a product with two matrices."""

    def matrix(x: Tensor, size: int, wanted: int, scale: float | None) -> Tensor:
        step = 1.0 / scale if scale else size / wanted
        at, of = (torch.arange(extent, dtype=x.dtype, device=x.device) + 0.5 for extent in (size, wanted))
        weights = kernel((at[:, None] - of * step).abs() / max(step, 1.0))
        return weights / weights.sum(0)

    def rewrite(x: Tensor, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
        sizes, scales = x.shape[-2:], scale_factors or (None, None)
        wanted = output_size or [int(size * scale) for size, scale in zip(sizes, scales, strict=True)]
        if align_corners or not all(isinstance(size, int) for size in (*sizes, *wanted)):
            return NotImplemented
        rows, columns = (matrix(x, *each) for each in zip(sizes, wanted, scales, strict=True))
        return rows.t() @ (x @ columns)

    return rewrite


def _lstm(
    x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """An LSTM with projections, which ONNX does not have, as one without.

    Its state before the projection, m, is that of a plain LSTM with the recurrent weight ``W_hh W_hr``; what it returns
    is ``W_hr m``. The state it begins with is no such product: units are added that hold it before the first step and
    are 0 ever after. Nothing tells how many steps there are.
    """
    ways, each = 1 + bidirectional, 3 + 2 * has_biases
    if len(weights) != layers * ways * each:
        return NotImplemented
    time = int(batch_first)
    last_h, last_c = [], []
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            at = layer * ways + way
            w_ih, w_hh, *biases, w_hr = weights[at * each : (at + 1) * each]
            h, c = states[0][at], states[1][at]
            units, more = c.shape[-1], h.shape[-1]
            raw, _, cell = _aten.lstm.input(
                x.flip(time) if way else x,
                [torch.cat([torch.zeros_like(c), h], -1)[None], torch.cat([c, torch.zeros_like(h)], -1)[None]],
                [_with_units(w, more) for w in (w_ih, torch.cat([w_hh @ w_hr, w_hh], 1), *biases)],
                has_biases, 1, 0.0, False, False, batch_first,
            )  # fmt: skip
            output = raw[..., :units] @ w_hr.t()
            last_h.append(output.select(time, -1))
            last_c.append(cell[0, :, :units])
            outputs.append(output.flip(time) if way else output)
        x = torch.cat(outputs, -1)
    return x, torch.stack(last_h), torch.stack(last_c)


def _with_units(weight: Tensor, more: int) -> Tensor:
    """A weight or bias of an LSTM with `more` units in each gate, all zeros: their state is 0 after a step from 0."""
    gates = weight.reshape(4, -1, *weight.shape[1:])
    return torch.cat([gates, gates.new_zeros(4, more, *weight.shape[1:])], 1).flatten(0, 1)


REWRITES: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    **{pool: _max_pool(axes) for axes, pool in MAX_POOLS.items()},
    **{pool: _avg_pool(axes) for axes, pool in AVG_POOLS.items()},
    _aten.add.Tensor: _add,
    _aten.log_sigmoid.default: _log_sigmoid,
    _aten.pad.default: _pad,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten._upsample_bilinear2d_aa.vec: _antialiased(_linear),
    _aten._upsample_bicubic2d_aa.vec: _antialiased(_cubic),
    _aten.lstm.input: _lstm,
}


def rewritten(program: ExportedProgram) -> ExportedProgram:
    """The program without what is written another way here."""
    if not any(node.target in REWRITES for node in program.graph.nodes):
        return program
    with torch.no_grad():
        made: ExportedProgram = program.run_decompositions(dict(REWRITES))
        return made
