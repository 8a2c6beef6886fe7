"""Names of layers: a layer is a weight that the model multiplies by, a module's or a parameter of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from autoprune.model.recurrent.names import as_linear, cell_of, layers_of

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of an nn.MultiheadAttention


def layer_name(parameter: str) -> str:
    """The layer whose weight is the parameter called so: the module's name for its ``weight``, else the parameter's."""
    return "" if parameter == "weight" else parameter.removesuffix(".weight")


def first_names(model: nn.Module) -> dict[str, str]:
    """Every layer name of every parameter of two axes or more -> the first name of that parameter."""
    first: dict[int, str] = {}
    names = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            names[layer_name(path)] = first.setdefault(id(parameter), layer_name(path))
    return names


def module_at(model: nn.Module, layer: str) -> nn.Module | None:
    """The module that a layer is; None where the layer is a parameter of its own, such as ``attn.in_proj_weight``."""
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """A layer's weight as it is stored, a parameter in general."""
    module = module_at(model, layer)
    head, _, tail = layer.rpartition(".")
    weight = getattr(model.get_submodule(head), tail) if module is None else module.weight
    assert isinstance(weight, Tensor)
    return weight


def layer_at(model: nn.Module, layer: str, turned: bool = False) -> nn.Module:
    """The module that a layer is, or a Linear that shares its parameter and the bias that is called alike.

    Args:
        model: that the layer is of.
        layer: its name.
        turned: whether a parameter that is no module's ``weight`` is ``(in, out)``.
    """
    module = module_at(model, layer)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):  # which look up the weight that others multiply by
        return as_linear(module, "weight")
    if module is not None:
        return module
    head, _, tail = layer.rpartition(".")
    linear = as_linear(model.get_submodule(head), tail)
    if turned:
        linear.weight = nn.Parameter(linear.weight.detach().t())
        linear.in_features, linear.out_features = linear.out_features, linear.in_features
    return linear


def as_read(values: Tensor, turned: bool) -> Tensor:
    """`values` that lie as a layer's parameter, as its operator reads them: ``(out, in, ...)``; a view."""
    return values.t() if turned else values


def as_held(values: Tensor, turned: bool) -> Tensor:
    """The opposite of `as_read`: contiguous, as the parameter is."""
    return values.t().contiguous() if turned else values


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the kinds that torch has modules for, by qualified name; the first name of a shared module.

    Each weight of an LSTM or GRU is a layer, under its own name: a Linear that shares it. So are those of the
    projections of a MultiheadAttention. Which other parameters are layers, only a run of the model tells.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own: Mapping[str, nn.Module] = {}
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            layers[name] = module
        elif cell_of(module) is not None:
            own = layers_of(module)
        elif isinstance(module, nn.MultiheadAttention):
            held = dict(module.named_parameters(recurse=False))
            own = {each: as_linear(module, each) for each in _ATTENTION if each in held}
        layers |= {f"{name}.{each}".lstrip("."): layer for each, layer in own.items()}
    return layers


def kind_of(model: nn.Module, layer: str) -> str:
    """What kind of layer the modules of `model` say that it is: ``conv2d``, ``linear``, ``lstm``, ``embedding``, ...

    Any module's own parameter that torch gives no meaning is a ``parameter``.
    """
    module = module_at(model, layer)
    if module is not None:
        for kind in (nn.Linear, nn.Conv1d, nn.Conv2d):
            if isinstance(module, kind):
                return kind.__name__.lower()
        return type(module).__name__.lower()
    head, _, tail = layer.rpartition(".")
    holder = model.get_submodule(head)
    if isinstance(holder, nn.RNNBase):
        return cell_of(holder) or holder.mode.partition("_")[0].lower()
    return "linear" if isinstance(holder, nn.MultiheadAttention) and tail in _ATTENTION else "parameter"
