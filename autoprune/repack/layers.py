"""Drop-in modules that run a packed weight: called like the Conv2d or Linear they replace, inference only.

A call needs no state but the packed arrays and its thread's scratch, so several threads may use one model. What
depends on the input's shape alone is computed once a shape.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.repack.formats import PackedWeight
from autoprune.repack.kernels import convolution, linear
from autoprune.repack.kernels.compiler import Target, host

RESULT_BYTES = 8 * 1024  # of results in flight: with their inputs, they must stay in the nearest caches
MANY_TOKENS = 16  # from here on a Linear with small groups is vectorised over its tokens
MAX_SHAPES = 64  # input shapes remembered a layer
_FAR = 2**62


@dataclass(frozen=True)
class Geometry:
    """All of a call that its input's shape decides. `arrays` keeps alive what `fields` points to."""

    kernel: Callable[..., None]
    fields: NDArray[np.int64]
    address: int  # of fields
    output: tuple[int, ...]
    scratch: int  # floats
    results_at: int  # byte offset of the result scratch
    arrays: tuple[Any, ...]


class _Scratch(threading.local):
    """One growing buffer a thread: warm in its cache, and never shared by two calls at a time."""

    def __init__(self) -> None:
        self.size, self.address = 0, 0
        self.buffer: Tensor | None = None


_SCRATCH = _Scratch()


def _scratch(size: int) -> int:
    """The address of at least `size` floats of this thread's scratch."""
    if _SCRATCH.size < size:
        _SCRATCH.buffer = torch.empty(size, dtype=torch.float32, device="cpu")  # aligned to a vector, unlike numpy's
        _SCRATCH.size, _SCRATCH.address = size, _SCRATCH.buffer.data_ptr()
    return _SCRATCH.address


class PackedLayer(nn.Module):
    """What the packed layers share: the packed arrays as buffers, and the dense weight rebuilt on request."""

    group_pointer: Tensor
    index: Tensor
    values: Tensor
    out_index: Tensor
    bias_rows: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None, relu: bool, target: Target | None = None) -> None:
        super().__init__()
        self.shape, self.conv_groups, self.group_size = packed.shape, packed.conv_groups, packed.group_size
        self.has_bias, self.relu, self.target = bias is not None, relu, target or host()
        rows = torch.from_numpy(packed.out_index)
        full = torch.zeros(packed.shape[0]) if bias is None else bias.detach()
        full = full.to(torch.float32)  # whatever the default dtype is
        self.register_buffer("group_pointer", torch.from_numpy(packed.group_pointer))
        self.register_buffer("index", torch.from_numpy(packed.index))
        self.register_buffer("values", torch.from_numpy(packed.values))
        self.register_buffer("out_index", rows)
        self.register_buffer("bias_rows", torch.where(rows >= 0, full[rows.clamp(min=0).long()], 0.0).contiguous())
        self._geometries: dict[tuple[int, ...], Geometry] = {}

    @property
    def packed(self) -> PackedWeight:
        arrays = (self.group_pointer.numpy(), self.index.numpy(), self.values.numpy(), self.out_index.numpy())
        return PackedWeight(self.shape, self.conv_groups, self.group_size, *arrays)

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt: for code that reads a layer's weight instead of calling the layer."""
        return self.packed.unpack()

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``(out,)``, or None."""
        if not self.has_bias:
            return None
        real = self.out_index >= 0
        full = self.bias_rows.new_empty(self.shape[0])
        full[self.out_index[real].long()] = self.bias_rows[real]
        return full

    def forward(self, input: Tensor) -> Tensor:  # named as torch's layers name it
        x = input
        if torch.compiler.is_compiling():
            return self._traced(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise AutopruneError(
                "a repacked model is for inference: call it under torch.inference_mode() or no_grad()."
            )
        if x.dtype != torch.float32 or not x.is_cpu:  # of a known shape too: native code takes what it gets for floats
            raise AutopruneError(f"a packed layer takes float32 on the CPU; the input is {x.dtype} on {x.device}.")
        geometry = self._geometries.get(x.shape) or self._prepare(tuple(x.shape))
        return self._call(geometry, x.contiguous())

    @abstractmethod
    def _traced(self, x: Tensor) -> Tensor:
        """The same through a torch operator, for torch.export and torch.compile."""

    @abstractmethod
    def _geometry(self, shape: tuple[int, ...]) -> Geometry:
        """What an input of `shape` needs; raises AutopruneError when it does not fit the layer."""

    @abstractmethod
    def _call(self, geometry: Geometry, x: Tensor) -> Tensor:
        """Runs the kernel."""

    def _prepare(self, shape: tuple[int, ...]) -> Geometry:
        if self.values.dtype != torch.float32 or not self.values.is_cpu:
            raise AutopruneError(
                "a packed layer runs in float32 on the CPU; its values are "
                f"{self.values.dtype} on {self.values.device}."
            )
        if len(self._geometries) >= MAX_SHAPES:  # inputs of ever new shapes must not fill the memory
            self._geometries = {}
        geometry = self._geometries[shape] = self._geometry(shape)
        return geometry

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Loads only arrays that are alike and valid together: native code follows their indices."""
        own = dict(self.named_buffers(recurse=False))
        given = {name: state_dict.get(prefix + name, buffer) for name, buffer in own.items()}
        try:
            for name, buffer in own.items():
                each = given[name]
                if each.shape != buffer.shape or each.dtype != buffer.dtype or not each.is_contiguous():
                    raise FileError(
                        f"{name} is {each.dtype} {tuple(each.shape)}, not {buffer.dtype} {tuple(buffer.shape)}"
                    )
            arrays = (given[name].numpy() for name in ("group_pointer", "index", "values", "out_index"))
            PackedWeight(self.shape, self.conv_groups, self.group_size, *arrays).validate()
        except FileError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'a packed layer'}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._geometries = {}  # offsets and addresses of what it had

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        self._geometries = {}  # addresses change when tensors move
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_geometries": {}}  # a copy has its own addresses

    def _pointers(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in (self.values, self.bias_rows, self.out_index))


def _convolution(
    layer: PackedLayer,
    window: tuple[tuple[int, ...], ...],
    image: tuple[int, int, int, int],
    out: tuple[int, int],
    output: tuple[int, ...],
) -> Geometry:
    """What the convolution kernel needs for (N, C, H, W) images; `window` is kernel, stride, padding, dilation."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    (batch, channels, height, width), (out_h, out_w) = image, out
    rows = layer.group_size
    _, vectors = layer.target.tile(rows)
    tile = vectors * layer.target.lanes
    flat = (kh, kw, sh, sw, ph, pw) == (1, 1, 1, 1, 0, 0) and height * width >= tile
    if flat:
        positions, end, copied = height * width, height * width, 0
        pitch = out_columns = tile * max(1, RESULT_BYTES // (4 * rows * tile))
        out_rows, block_rows, plane = -(-positions // pitch), 1, positions
        block = pitch
    else:
        pitch = width + pw if sw == 1 else -(-(width + 2 * pw) // sw)
        plane = -(-(height + 2 * ph) // sh) * pitch
        positions, end, copied = (out_h - 1) * pitch + out_w, _FAR, 1
        out_rows, out_columns = out_h, out_w
        block_rows = min(out_h, max(1, RESULT_BYTES // (4 * rows * pitch)))
        block = (block_rows - 1) * pitch + out_w
    scratch = channels * sh * sw * plane + pw + tile if copied else 0
    if max(scratch, channels * height * width) > 2**31 - 1:
        raise AutopruneError(f"an image of shape {(channels, height, width)} is too large for 32-bit offsets.")
    y_pitch = -(-block // tile) * tile + tile
    taps = np.arange(kh * kw)
    dy, dx = taps // kw * dh, taps % kw * dw
    plane_of = (dy % sh) * sw + dx % sw
    tap_at = plane_of * plane + dy // sh * pitch + dx // sw
    channel, tap = np.divmod(layer.index.numpy(), kh * kw)
    offsets = (channel.astype(np.int64) * sh * sw * plane + tap_at[tap]).astype(np.int32)
    # A plane no kept tap reads need not be filled; with more planes than bits, all are.
    phases = int(np.bitwise_or.reduce(1 << plane_of[tap], initial=0)) if sh * sw < 63 else -1
    f = convolution.Field
    values, bias, out_index = layer._pointers()
    given = {
        f.BATCH: batch, f.CHANNELS: channels, f.HEIGHT: height, f.WIDTH: width, f.STRIDE_H: sh, f.STRIDE_W: sw,
        f.PAD_H: ph, f.PAD_W: pw, f.PITCH: pitch, f.PLANE: plane, f.COPY: copied, f.SCRATCH: scratch,
        f.OUT_ROWS: out_rows, f.OUT_COLUMNS: out_columns, f.POSITIONS: positions, f.END: end,
        f.BLOCK_ROWS: block_rows, f.GROUPS: len(layer.out_index), f.RELU: int(layer.relu), f.Y_PITCH: y_pitch,
        f.X_IMAGE: channels * height * width, f.Y_IMAGE: layer.shape[0] * out_h * out_w,
        f.Y_CHANNEL: out_h * out_w, f.GROUP_POINTER: layer.group_pointer.data_ptr(),
        f.OFFSETS: offsets.ctypes.data, f.VALUES: values, f.BIAS: bias, f.OUT_INDEX: out_index, f.Y_MARGIN: tile,
        f.ZEROED: int(ph > 0 or pw > 0), f.PHASES: phases,
    }  # fmt: skip
    fields = np.array([given[field] for field in f], dtype=np.int64)
    total = scratch + tile + rows * y_pitch
    kernel = convolution.convolution_kernel(rows, layer.target)
    return Geometry(kernel, fields, fields.ctypes.data, output, total, 4 * scratch, (offsets,))


class PackedConv2d(PackedLayer):
    """A Conv2d of any stride, padding, dilation and groups. (N, C, H, W) or (C, H, W), as Conv2d."""

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        relu: bool = False,
        target: Target | None = None,
    ) -> None:
        super().__init__(packed, bias, relu, target)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.out_channels, self.in_channels = self.shape[0], self.shape[1] * self.conv_groups
        self.kernel_size, self.groups = self.shape[2:], self.conv_groups

    def _traced(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self._traced(x[None])[0]
        geometry = [*self.shape, self.conv_groups, self.group_size, *self.stride, *self.padding, *self.dilation]
        arrays = (self.group_pointer, self.index, self.values, self.out_index, self.bias_rows)
        out: Tensor = torch.ops.autoprune.packed_conv2d(x, *arrays, geometry, self.relu)
        return out

    def _call(self, geometry: Geometry, x: Tensor) -> Tensor:
        y = x.new_empty(geometry.output)
        at = _scratch(geometry.scratch)
        geometry.kernel(geometry.address, x.data_ptr(), y.data_ptr(), at, at + geometry.results_at)
        return y

    def _geometry(self, shape: tuple[int, ...]) -> Geometry:
        if len(shape) not in (3, 4) or shape[-3] != self.in_channels:
            raise AutopruneError(
                f"this convolution takes (N, {self.in_channels}, H, W), not an input of shape {tuple(shape)}."
            )
        batch, (channels, height, width) = (shape[0] if len(shape) == 4 else 1), shape[-3:]
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel_size, self.stride, self.padding, self.dilation
        out_h, out_w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in ((height, ph, dh, kh, sh), (width, pw, dw, kw, sw))
        )
        if out_h < 1 or out_w < 1:
            raise AutopruneError(f"an input of {height}x{width} is smaller than the {kh}x{kw} kernel.")
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        output = (*shape[:-3], self.out_channels, out_h, out_w)
        return _convolution(self, window, (batch, channels, height, width), (out_h, out_w), output)


class PackedLinear(PackedLayer):
    """A Linear over the last dimension. (..., in) -> (..., out)."""

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None, relu: bool = False, target: Target | None = None
    ) -> None:
        super().__init__(packed, bias, relu, target)
        self.out_features, self.in_features = self.shape

    def _traced(self, x: Tensor) -> Tensor:
        arrays = (self.group_pointer, self.index, self.values, self.out_index, self.bias_rows)
        geometry = [*self.shape, self.group_size]
        out: Tensor = torch.ops.autoprune.packed_linear(x, *arrays, geometry, self.relu)
        return out

    def _call(self, geometry: Geometry, x: Tensor) -> Tensor:
        if geometry.scratch:
            return self._call_transposed(geometry, x)
        y = x.new_empty(geometry.output)
        geometry.kernel(geometry.address, x.data_ptr(), y.data_ptr())
        return y

    def _call_transposed(self, geometry: Geometry, x: Tensor) -> Tensor:
        """As a 1x1 convolution over the tokens."""
        image = x.view(-1, self.in_features).t().contiguous()  # (in, tokens)
        y = x.new_empty((self.out_features, image.shape[1]))
        at = _scratch(geometry.scratch)
        geometry.kernel(geometry.address, image.data_ptr(), y.data_ptr(), at, at + geometry.results_at)
        return y.t().contiguous().view(geometry.output)

    def _geometry(self, shape: tuple[int, ...]) -> Geometry:
        if not shape or shape[-1] != self.in_features:
            raise AutopruneError(f"this Linear takes (..., {self.in_features}), not an input of shape {shape}.")
        tokens, output = int(np.prod(shape[:-1], dtype=np.int64)), (*shape[:-1], self.out_features)
        if tokens >= MANY_TOKENS and self.group_size < self.target.lanes:
            # A group would not fill a vector, the tokens do.
            window = ((1, 1), (1, 1), (0, 0), (1, 1))
            return _convolution(self, window, (1, self.in_features, 1, tokens), (1, tokens), output)
        f = linear.Field
        values, bias, out_index = self._pointers()
        given = {
            f.TOKENS: tokens, f.IN_FEATURES: self.in_features, f.OUT_FEATURES: self.out_features,
            f.GROUPS: len(self.out_index), f.RELU: int(self.relu), f.GROUP_POINTER: self.group_pointer.data_ptr(),
            f.INDEX: self.index.data_ptr(), f.VALUES: values, f.BIAS: bias, f.OUT_INDEX: out_index,
        }  # fmt: skip
        fields = np.array([given[field] for field in f], dtype=np.int64)
        kernel = linear.linear_kernel(self.group_size, self.target)
        return Geometry(kernel, fields, fields.ctypes.data, output, 0, 0, ())


def _rebuilt(
    arrays: tuple[Tensor, ...], shape: tuple[int, ...], conv_groups: int, size: int
) -> tuple[PackedWeight, Tensor]:
    pointer, index, values, out_index, bias_rows = arrays
    packed = PackedWeight(shape, conv_groups, size, pointer.numpy(), index.numpy(), values.numpy(), out_index.numpy())
    bias = bias_rows.new_zeros(shape[0])
    real = out_index >= 0
    bias[out_index[real].long()] = bias_rows[real]
    return packed, bias


@torch.library.custom_op("autoprune::packed_conv2d", mutates_args=())
def packed_conv2d(
    x: Tensor,
    group_pointer: Tensor,
    index: Tensor,
    values: Tensor,
    out_index: Tensor,
    bias_rows: Tensor,
    geometry: list[int],
    relu: bool,
) -> Tensor:
    """A packed convolution as a torch operator; `geometry` is shape, groups, group size, stride, padding, dilation."""
    out, per_group, kh, kw, groups, size, sh, sw, ph, pw, dh, dw = geometry
    arrays = (group_pointer, index, values, out_index, bias_rows)
    packed, bias = _rebuilt(arrays, (out, per_group, kh, kw), groups, size)
    return PackedConv2d(packed, bias, (sh, sw), (ph, pw), (dh, dw), relu)(x.detach())  # type: ignore[no-any-return]


@packed_conv2d.register_fake
def _(
    x: Tensor, group_pointer: Tensor, index: Tensor, values: Tensor, out_index: Tensor, bias_rows: Tensor,
    geometry: list[int], relu: bool,
) -> Tensor:  # fmt: skip
    out, _, kh, kw, _, _, sh, sw, ph, pw, dh, dw = geometry
    high = (x.shape[2] + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    wide = (x.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    return x.new_empty((x.shape[0], out, high, wide))


@torch.library.custom_op("autoprune::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    group_pointer: Tensor,
    index: Tensor,
    values: Tensor,
    out_index: Tensor,
    bias_rows: Tensor,
    geometry: list[int],
    relu: bool,
) -> Tensor:
    """A packed Linear as a torch operator; `geometry` is out, in, group size."""
    out, features, size = geometry
    arrays = (group_pointer, index, values, out_index, bias_rows)
    packed, bias = _rebuilt(arrays, (out, features), 1, size)
    return PackedLinear(packed, bias, relu)(x.detach())  # type: ignore[no-any-return]


@packed_linear.register_fake
def _(
    x: Tensor, group_pointer: Tensor, index: Tensor, values: Tensor, out_index: Tensor, bias_rows: Tensor,
    geometry: list[int], relu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], geometry[0]))
