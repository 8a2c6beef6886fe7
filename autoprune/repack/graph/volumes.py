"""Liftings of operators on ``(batch, channels, frames, height, width)``: what they are on maps, one for each frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autoprune.repack.graph.ops import Add, AvgPool2d, Conv2d, MaxPool2d, Op, Reshape, Scalar, TorchOp
from autoprune.repack.graph.site import Result, Site, extents

LAST = 2**63 - 1  # where a slice ends that goes on to the end
FRAMES_FIRST = (0, 2, 1, 3, 4)  # changes frames and channels, and back


class _Frames:
    """The operations between a volume and what it is computed from, frame by frame.

    Args:
        site: of an operator whose first result is a volume.
        argument: the name of the volume that it reads.
    """

    def __init__(self, site: Site, argument: str) -> None:
        self.site, self.ops, self.count = site, list[Op](), 0
        node, result = site.args[argument], site.result
        assert result is not None
        self.source, self.given, self.made = site.name(argument), node, result
        self.sizes = dict(zip(extents(node), enumerate(node.meta["val"].shape), strict=True))
        self.frames = self.call("permute", self.source, list(FRAMES_FIRST))  # (batch, frames, channels, height, width)

    def named(self) -> str:
        """A name that nothing else has."""
        self.count += 1
        return f"{self.site.output} part {self.count}"

    def call(self, operator: str, given: Any, *args: Any) -> str:
        """Adds an operator of torch, and returns the name of its result."""
        first = [{"ref": name} for name in given] if isinstance(given, list) else {"ref": given}
        self.ops.append(TorchOp.of(self.named(), f"aten.{operator}.default", (first, *args)))
        return self.ops[-1].output

    def taps(self, count: int, stride: int, padding: int, dilation: int) -> list[str]:
        """What each tap of a kernel over the frames reads: ``(batch, frames of the result, channels, ...)``."""
        frames = self.call("pad", self.frames, [*[0] * 6, padding, padding]) if padding else self.frames
        if count == stride == 1:
            return [frames]
        found = []
        for tap in range(count):
            behind = (count - 1 - tap) * dilation
            args = ({"ref": frames}, 1, tap * dilation, -behind if behind else LAST, stride)
            self.ops.append(TorchOp.of(self.named(), "aten.slice.Tensor", args))
            found.append(self.ops[-1].output)
        return found

    def as_maps(self, frames: str, channels: int | None = None, joined: bool = False) -> str:
        """``(batch, frames, channels, ...)`` as one batch of maps.

        Args:
            frames: the name of the value.
            channels: how many; as many as the volume has that is read where None.
            joined: whether it lies in order already.
        """
        if not joined:
            frames = self.call("contiguous", frames)
        size = [self._extent(self.made, 0), self._extent(self.made, 2)]
        own, high, wide = (self._extent(self.given, axis) for axis in (1, 3, 4))
        shape = (self._product(size), own if channels is None else channels, high, wide)
        self.ops.append(Reshape(self.named(), (frames,), shape=shape))
        return self.ops[-1].output

    def finished(self, maps: str) -> Result:
        """The operations, the last of which makes of maps the result."""
        batch, channels, count, high, wide = (self._extent(self.made, axis) for axis in range(5))
        frames = self.named()
        self.ops.append(Reshape(frames, (maps,), shape=(batch, count, channels, high, wide)))
        volume = TorchOp.of(self.site.output, "aten.permute.default", ({"ref": frames}, list(FRAMES_FIRST)))
        return (*self.ops, volume)

    def _extent(self, node: Any, axis: int) -> Any:
        extent = extents(node)[axis]
        if isinstance(extent, int):
            return extent
        if extent in self.sizes:
            own, value = self.sizes[extent]
            return {"ref": self.site.context.integers.size(value, self.source, own)}
        return {"ref": self.site.context.integers.extent(node.meta["val"].shape[axis])}

    def _product(self, sizes: Sequence[Any]) -> Any:
        names = [size["ref"] if isinstance(size, dict) else size for size in sizes]
        if all(isinstance(name, int) for name in names):
            return names[0] * names[1]
        self.ops.append(Scalar.of(self.named(), "mul", tuple(names)))
        return {"ref": self.ops[-1].output}


def _three(value: Any, default: Any = None) -> tuple[int, int, int] | None:
    """``[3]`` and ``[3, 3, 3]`` as three integers, frames first; None for anything that is not known now."""
    values = [value] if isinstance(value, int) else list(value or default or [])
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(type(each) is int for each in values):
        return None
    return values[0], values[1], values[2]


def _conv3d(site: Site) -> Result:
    """The channels of all frames that a kernel meets beside each other; of a depthwise one a sum over its frames."""
    tensors = site.weights(weight="weight", bias="bias")
    if tensors is None or not site.is_value("input", 5) or not site.is_weight("weight", 5):
        return None
    a, weight = site.args, site.context.constants[tensors["weight"]]
    stride, dilation = _three(a["stride"]), _three(a["dilation"])
    padding = (0, 0, 0) if a["padding"] == "valid" else None if a["padding"] == "same" else _three(a["padding"])
    if stride is None or dilation is None or padding is None:
        return None
    count, groups = weight.shape[2], a["groups"]
    if groups > 1 and count > 1 and weight.shape[1] > 1:
        return None
    layer, name, frames = site.layer(), tensors.pop("weight"), _Frames(site, "input")
    taps = frames.taps(count, stride[0], padding[0], dilation[0])

    def convolution(maps: str, weight: torch.Tensor, tensors: Mapping[str, str], layer: str | None) -> str:
        made, held = frames.named(), site.context.constant(f"{name}.frames", weight)
        frames.ops.append(
            Conv2d(
                made, (maps,), {**tensors, "weight": held}, stride=stride[1:], padding=padding[1:],
                dilation=dilation[1:], groups=groups, activation=None, layer=layer,
            )
        )  # fmt: skip
        return made

    if groups == 1 and count > 1:
        joined = frames.call("cat", taps, 2)
        maps = frames.as_maps(joined, count * weight.shape[1], joined=True)
        return frames.finished(convolution(maps, weight.transpose(1, 2).flatten(1, 2), tensors, layer))
    made = convolution(frames.as_maps(taps[0]), weight[:, :, 0], tensors, layer)
    for tap, given in enumerate(taps[1:], 1):
        more = convolution(frames.as_maps(given), weight[:, :, tap], {}, None)
        frames.ops.append(Add(frames.named(), (made, more), activation=None))
        made = frames.ops[-1].output
    return frames.finished(made)


def _pool3d(site: Site, make: Callable[..., Op], dilation: tuple[int, int, int] | None, **more: Any) -> Result:
    """One whose windows are of one frame each."""
    a = site.args
    kernel, padding = _three(a["kernel_size"]), _three(a["padding"])
    stride = _three(a["stride"], a["kernel_size"])
    if not site.is_value("self", 5) or kernel is None or stride is None or padding is None or site.result is None:
        return None
    if kernel[0] != 1 or stride[0] != 1 or padding[0]:
        return None
    frames = _Frames(site, "self")
    maps = frames.as_maps(frames.frames)
    options = {**more, **({} if dilation is None else {"dilation": dilation[1:]})}
    frames.ops.append(
        make(
            frames.named(), (maps,), kernel=kernel[1:], stride=stride[1:], padding=padding[1:],
            ceil_mode=a["ceil_mode"], **options,
        )
    )  # fmt: skip
    return frames.finished(frames.ops[-1].output)


def _max_pool3d(site: Site) -> Result:
    dilation = _three(site.args["dilation"])
    return None if dilation is None else _pool3d(site, MaxPool2d, dilation)


def _avg_pool3d(site: Site) -> Result:
    divisor = site.args["divisor_override"]
    if divisor is not None and divisor < 1:
        return None
    return _pool3d(site, AvgPool2d, None, count_include_pad=site.args["count_include_pad"], divisor=divisor)


def _adaptive_avg_pool3d(site: Site) -> Result:
    """To one number a channel."""
    if _three(site.args["output_size"]) != (1, 1, 1) or not site.is_value("self", 5):
        return None
    return TorchOp.of(site.output, "aten.mean.dim", ({"ref": site.name("self")}, [2, 3, 4], True))


LIFTINGS: Mapping[str, Callable[[Site], Result]] = {
    "conv3d.default": _conv3d,
    "conv3d.padding": _conv3d,
    "max_pool3d.default": _max_pool3d,
    "max_pool3d_with_indices.default": _max_pool3d,
    "avg_pool3d.default": _avg_pool3d,
    "adaptive_avg_pool3d.default": _adaptive_avg_pool3d,
}
