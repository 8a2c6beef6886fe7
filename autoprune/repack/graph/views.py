"""Liftings of operators that compute nothing: views, copies, casts to the same type, and tensors of one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from autoprune.repack.graph import aten
from autoprune.repack.graph.ops import Reshape, TorchOp
from autoprune.repack.graph.site import Alias, Result, Site, extents


def _reshape(site: Site) -> Result:
    """Any operator whose result holds the same elements in the same order."""
    source = site.args["self"]
    if site.context.names[source] in site.context.constants:
        return None
    before, after = extents(source), extents(site.node)
    if before == after:
        return Alias(site.name("self"))
    shape = _shape(site, before, after)
    if site.is_value("self") and source.meta["val"].is_contiguous():
        return Reshape(site.output, (site.name("self"),), shape=tuple(shape))
    # torch would copy here, or not: that hangs on strides, which are the executor's own business
    return TorchOp.of(site.output, "aten.reshape.default", ({"ref": site.name("self")}, shape))


def _shape(site: Site, before: tuple[int | str, ...], after: tuple[int | str, ...]) -> list[Any]:
    """The new extents: integers, references, and -1 at most once."""
    given = site.args.get("size") or site.args.get("shape") or [None] * len(after)
    alone = sum(isinstance(extent, str) for extent in after) == 1  # beside a batch of 0, -1 would tell nothing
    shape: list[Any] = []
    for extent, asked in zip(after, given, strict=True):
        if isinstance(extent, int):
            shape.append(extent)
        elif isinstance(asked, fx.Node):
            shape.append({"ref": site.context.names[asked]})
        elif extent in before:
            axis, source = before.index(extent), site.args["self"]
            shape.append({"ref": site.context.integers.size(source.meta["val"].shape[axis], site.name("self"), axis)})
        elif alone:
            shape.append(-1)
        else:
            shape.append({"ref": site.context.integers.extent(site.node.meta["val"].shape[len(shape)])})
    return shape


def _filled(name: str) -> Callable[[Site], Result]:
    """A tensor of one number, of which it needs the other tensor's shape and type alone: it reads neither."""

    def lifted(site: Site) -> Result:
        made = site.node.meta["val"]
        if made.is_complex() or site.context.names[site.args["self"]] in site.context.constants:
            return None
        sizes = site.args.get("size")
        if sizes is None:
            sizes, axes = site.args["self"].meta["val"].shape, range(made.ndim)
            sizes = [
                n if type(n) is int else {"ref": site.context.integers.size(n, site.name("self"), axis)}
                for n, axis in zip(sizes, axes, strict=True)
            ]
        args: list[Any] = [[{"ref": site.context.names[n]} if isinstance(n, fx.Node) else n for n in sizes]]
        if name == "full":
            value = site.args["fill_value"]
            args.append({"ref": site.context.names[value]} if isinstance(value, fx.Node) else aten.encode_number(value))
        dtype = {"dtype": aten.encode_dtype(made.dtype)}
        return TorchOp.of(site.output, f"aten.{name}.default", tuple(args), {"dtype": dtype})

    return lifted


def _nothing(site: Site) -> Result:
    return Alias(site.name("self" if "self" in site.args else "input"))


def _dropout(site: Site) -> Result:
    return None if site.args["train"] else _nothing(site)


def _same_type(site: Site) -> Result:
    same = site.node.meta["val"].dtype == site.args["self"].meta["val"].dtype
    return _nothing(site) if same else None


def _moved(site: Site) -> Result:
    """A move to a device, the CPU as `Site` is told, and perhaps another type."""
    made = site.node.meta["val"]
    if made.device.type != "cpu" or made.is_complex():
        return None
    if isinstance(_same_type(site), Alias):
        return _nothing(site)
    dtype = aten.encode_dtype(made.dtype)
    return TorchOp.of(site.output, "aten.to.dtype", ({"ref": site.name("self")}, {"dtype": dtype}))


def _whole(site: Site) -> Result:
    """An expansion or a slice that leaves the shape as it is."""
    return _nothing(site) if extents(site.node) == site.shape("self") and site.args.get("step", 1) == 1 else None


def _rolled(site: Site) -> Result:
    """A roll that leaves everything where it is."""
    a, extent = site.args, site.shape("self")
    for shift, dim in zip(a["shifts"], a["dims"], strict=False):
        size = extent[dim % len(extent)]
        if type(shift) is not int or not isinstance(size, int) or not size or shift % size:
            return None
    return _nothing(site) if a["dims"] else None


def bordered(site: Site) -> Result:
    """A border of nothing, as models add to what already fits."""
    return _nothing(site) if all(type(each) is int and not each for each in site.args["pad"]) else None


LIFTINGS: Mapping[str, Callable[[Site], Result]] = {
    "view.default": _reshape,
    "_unsafe_view.default": _reshape,
    "reshape.default": _reshape,
    "reshape_as.default": _reshape,
    "view_as.default": _reshape,
    "flatten.using_ints": _reshape,
    "unflatten.int": _reshape,
    "unsqueeze.default": _reshape,
    "squeeze.dim": _reshape,
    "squeeze.dims": _reshape,
    "clone.default": _nothing,
    "contiguous.default": _nothing,
    "alias.default": _nothing,
    "detach.default": _nothing,
    "lift_fresh_copy.default": _nothing,
    "dropout.default": _dropout,
    "feature_dropout.default": _dropout,
    "alpha_dropout.default": _dropout,
    "feature_alpha_dropout.default": _dropout,
    "_to_copy.default": _same_type,
    "to.dtype": _same_type,
    "to.dtype_layout": _same_type,
    "to.device": _moved,
    "to.other": _moved,
    "type_as.default": _moved,
    **{f"new_{name}.default": _filled(name) for name in ("zeros", "ones", "full")},
    **{f"{name}_like.default": _filled(name) for name in ("zeros", "ones", "full")},
    "roll.default": _rolled,
    "slice.Tensor": _whole,
    "expand.default": _whole,
}
