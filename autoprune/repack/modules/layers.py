"""Drop-in modules that run a packed weight: called like the Conv2d or Linear they replace, inference only.

Each is a program of one operation. Several threads may use one module.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Conv2d, Linear, Op
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.modules.dense_weight import DenseWeight
from autoprune.repack.runtime.program import Program
from autoprune.repack.weights.packed import PackedWeight


def check_input(x: Tensor) -> None:
    """Raises AutopruneError for what no packed layer takes; of a known shape too: native code takes it for floats."""
    if x.requires_grad and torch.is_grad_enabled():
        raise AutopruneError("a repacked model is for inference: call it under torch.inference_mode() or no_grad().")
    if x.dtype != torch.float32 or not x.is_cpu:
        raise AutopruneError(f"a packed layer takes float32 on the CPU; the input is {x.dtype} on {x.device}.")


class PackedLayer(nn.Module):
    """What the packed layers share: the packed arrays as buffers, and the dense weight rebuilt on request."""

    group_pointer: Tensor
    index: Tensor
    values: Tensor
    out_index: Tensor
    bias_or_zero: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None, relu: bool, target: Target | None = None) -> None:
        super().__init__()
        self.shape, self.conv_groups, self.group_size = packed.shape, packed.conv_groups, packed.group_size
        self.has_bias, self.relu, self.target = bias is not None, relu, target or host()
        full = torch.zeros(packed.shape[0]) if bias is None else bias.detach()
        self.register_buffer("group_pointer", torch.from_numpy(packed.group_pointer))
        self.register_buffer("index", torch.from_numpy(packed.index))
        self.register_buffer("values", torch.from_numpy(packed.values))
        self.register_buffer("out_index", torch.from_numpy(packed.out_index))
        self.register_buffer("bias_or_zero", full.to(torch.float32))  # whatever the default dtype is
        self._program: Program | None = None

    @property
    def packed(self) -> PackedWeight:
        arrays = (self.group_pointer.numpy(), self.index.numpy(), self.values.numpy(), self.out_index.numpy())
        return PackedWeight(self.shape, self.conv_groups, self.group_size, *arrays)

    @property
    def weight(self) -> Tensor:
        """The dense weight: for code that reads a layer's weight instead of calling the layer."""
        return DenseWeight.of(self.shape, lambda: self.packed.unpack())

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``(out,)``, or None."""
        return self.bias_or_zero if self.has_bias else None

    def forward(self, input: Tensor) -> Tensor:  # named as torch's layers name it
        x = input
        # Another thread's export makes all threads compile, but not with a tensor of a tracer's own type.
        if torch.compiler.is_dynamo_compiling() or (type(x) is not Tensor and torch.compiler.is_compiling()):
            return self._traced(x)
        check_input(x)
        program = self._program or self._prepare()
        return self._run(program, x)

    @abstractmethod
    def _traced(self, x: Tensor) -> Tensor:
        """The same through a torch operator, for torch.export and torch.compile."""

    @abstractmethod
    def _op(self) -> Op:
        """The operation, from ``x`` to ``y``."""

    @abstractmethod
    def _run(self, program: Program, x: Tensor) -> Tensor:
        """Runs the program; raises AutopruneError when the input's shape does not fit the layer."""

    def _prepare(self) -> Program:
        if self.values.dtype != torch.float32 or not self.values.is_cpu:
            raise AutopruneError(
                "a packed layer runs in float32 on the CPU; its values are "
                f"{self.values.dtype} on {self.values.device}."
            )
        weight = torch.empty(self.shape, device="meta")
        graph = Graph((Input("x", (), "float32"),), (self._op(),), "y", {"weight": weight})
        weights = Weights.of(self.packed, self.bias_or_zero)
        self._program = Program(graph, {"y": weights}, target=self.target)
        return self._program

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
        self._program = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        self._program = None  # addresses change when tensors move
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}  # a copy has its own addresses


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
        arrays = (self.group_pointer, self.index, self.values, self.out_index, self.bias_or_zero)
        out: Tensor = torch.ops.autoprune.packed_conv2d(x, *arrays, geometry, self.relu)
        return out

    def _op(self) -> Op:
        return Conv2d(
            "y", ("x",), {"weight": "weight"}, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.conv_groups, activation="relu" if self.relu else None,
        )  # fmt: skip

    def _run(self, program: Program, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self._run(program, x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise AutopruneError(
                f"this convolution takes (N, {self.in_channels}, H, W), not an input of shape {tuple(x.shape)}."
            )
        y: Tensor = program.whole_plan((tuple(x.shape),)).run((x,))
        return y


class PackedLinear(PackedLayer):
    """A Linear over the last dimension. (..., in) -> (..., out)."""

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None, relu: bool = False, target: Target | None = None
    ) -> None:
        super().__init__(packed, bias, relu, target)
        self.out_features, self.in_features = self.shape

    def _traced(self, x: Tensor) -> Tensor:
        arrays = (self.group_pointer, self.index, self.values, self.out_index, self.bias_or_zero)
        geometry = [*self.shape, self.group_size]
        out: Tensor = torch.ops.autoprune.packed_linear(x, *arrays, geometry, self.relu)
        return out

    def _op(self) -> Op:
        return Linear("y", ("x",), {"weight": "weight"}, activation="relu" if self.relu else None)

    def _run(self, program: Program, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise AutopruneError(
                f"this Linear takes (..., {self.in_features}), not an input of shape {tuple(x.shape)}."
            )
        y: Tensor = program.whole_plan((tuple(x.shape),)).run((x,))
        return y


def _packed(arrays: tuple[Tensor, ...], shape: tuple[int, ...], conv_groups: int, size: int) -> PackedWeight:
    pointer, index, values, out_index = (each.numpy() for each in arrays)
    return PackedWeight(shape, conv_groups, size, pointer, index, values, out_index)


@torch.library.custom_op("autoprune::packed_conv2d", mutates_args=())
def packed_conv2d(
    x: Tensor,
    group_pointer: Tensor,
    index: Tensor,
    values: Tensor,
    out_index: Tensor,
    bias: Tensor,
    geometry: list[int],
    relu: bool,
) -> Tensor:
    """A packed convolution as a torch operator; `geometry` is shape, groups, group size, stride, padding, dilation."""
    out, per_group, kh, kw, groups, size, sh, sw, ph, pw, dh, dw = geometry
    packed = _packed((group_pointer, index, values, out_index), (out, per_group, kh, kw), groups, size)
    return PackedConv2d(packed, bias, (sh, sw), (ph, pw), (dh, dw), relu)(x.detach())  # type: ignore[no-any-return]


@packed_conv2d.register_fake
def _(
    x: Tensor, group_pointer: Tensor, index: Tensor, values: Tensor, out_index: Tensor, bias: Tensor,
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
    bias: Tensor,
    geometry: list[int],
    relu: bool,
) -> Tensor:
    """A packed Linear as a torch operator; `geometry` is out, in, group size."""
    out, features, size = geometry
    packed = _packed((group_pointer, index, values, out_index), (out, features), 1, size)
    return PackedLinear(packed, bias, relu)(x.detach())  # type: ignore[no-any-return]


@packed_linear.register_fake
def _(
    x: Tensor, group_pointer: Tensor, index: Tensor, values: Tensor, out_index: Tensor, bias: Tensor,
    geometry: list[int], relu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], geometry[0]))
