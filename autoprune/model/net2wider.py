"""Wider models that compute the same: Net2WiderNet (Chen et al. 2016, Net2Net).

The weights that read a copied channel are shared among it and its copies in uneven parts that sum to the weight: the
output stays what it was up to rounding, yet no two get the same gradient, so that training tells them apart. Copies
get small parts: of even ones each would be weaker than a channel that was not copied, and would be pruned before it,
however much the model needs what they compute together.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.checks import check_numbers
from autoprune.errors import AutopruneError
from autoprune.model.arguments import call_with
from autoprune.model.inventory import as_tuple, eval_mode

FAINT = 0.1  # share of a copy, over that of what it copies
UNEVEN = 0.2  # shares are drawn within this of those, relatively
TOLERANCE = 1e-4  # of the output, relative to its largest entry

_ANYWHERE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.LeakyReLU,
    nn.ELU, nn.Softplus, nn.Identity, nn.Dropout,
)  # fmt: skip
_IMAGES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d, nn.Upsample)
_FUNCTIONS: frozenset[Any] = frozenset({
    torch.relu, torch.sigmoid, torch.tanh, functional.relu, functional.relu6, functional.gelu, functional.silu,
    functional.hardswish, functional.leaky_relu, functional.elu, functional.dropout, "relu", "sigmoid", "tanh",
})  # fmt: skip
_IMAGE_FUNCTIONS: frozenset[Any] = frozenset(
    {functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.max_pool2d}
)


@dataclass(frozen=True)
class Widened:
    """What `expand` returns.

    Attributes:
        model: a wider copy that computes the same.
        layers: layer whose filters or neurons were multiplied -> how many it had and has.
    """

    model: nn.Module
    layers: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class _Chain:
    """Channels that one layer writes and one layer reads.

    Attributes:
        writer: name of the layer whose rows they are.
        between: (name, entries a channel) of norms and depthwise convolutions on the way.
        reader: (name, columns a channel).
    """

    writer: str
    between: tuple[tuple[str, int], ...]
    reader: tuple[str, int]

    @property
    def layers(self) -> list[str]:
        return [self.writer, *(name for name, _ in self.between), self.reader[0]]


def expand(
    model: nn.Module, inputs: Any, factor: float, *, only: Collection[str] | None = None, seed: int = 0
) -> Widened:
    """A copy of `model` whose inner channels are `factor` times as many and that computes the same.

    Inner channels go from one Conv2d or Linear, through channelwise operations, to one other alone; what is added,
    concatenated or returned (a residual stream) keeps its width.

    Args:
        model: any model that torch.fx can trace; it is left as it is.
        inputs: a tensor or a tuple of them, as the model is called.
        factor: >= 1; each width is rounded.
        only: names of the Conv2d and Linear layers that may change their shape; all when None.
        seed: of which channels are copied, and of the shares.

    Raises:
        AutopruneError: `factor` below 1, torch.fx cannot trace the model, or nothing in it can be widened.
    """
    wider = copy.deepcopy(model)
    return Widened(wider, expand_(wider, inputs, factor, only=only, seed=seed))


def expand_(
    model: nn.Module, inputs: Any, factor: float, *, only: Collection[str] | None = None, seed: int = 0
) -> dict[str, tuple[int, int]]:
    """Like `expand`, in place; returns the layers whose filters were multiplied."""
    check_numbers("widening a model", {"factor": factor}, 1.0, 16.0)
    if factor == 1.0:
        return {}
    before = _run(model, inputs)
    chains = [chain for chain in _chains(model, inputs) if only is None or _may_change(model, chain, only)]
    if not chains:
        raise AutopruneError(
            "nothing in this model can be widened: no channels go from one Conv2d or Linear to one other alone"
            f"{' within the layers that may change' if only is not None else ''}. Set factor to 1."
        )
    generator = torch.Generator().manual_seed(seed)
    widened = {}
    for chain in chains:
        width = len(_weight(model, chain.writer))
        source = _sources(width, round(width * factor), generator)
        _widen_(model, chain, source, generator)
        widened[chain.writer] = (width, len(source))
    after = _run(model, inputs)
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or not bool((old - new).abs().max() <= TOLERANCE * old.abs().max().clamp(min=1.0)):
            raise AutopruneError(
                "the widened model does not compute what the model did: its code reads a width that tracing does not "
                "show. Set factor to 1."
            )
    return widened


def _sources(width: int, wider: int, generator: torch.Generator) -> Tensor:
    """Old channel that each new one is a copy of; the first `width` are themselves, counts differ by 1 at most."""
    rounds = -(-wider // width) - 1
    copies = [torch.randperm(width, generator=generator) for _ in range(rounds)]
    return torch.cat([torch.arange(width), *copies])[:wider]


def _widen_(model: nn.Module, chain: _Chain, source: Tensor, generator: torch.Generator) -> None:
    writer = model.get_submodule(chain.writer)
    _take_rows_(writer, ("weight", "bias"), source)
    _resize_(writer, "out", len(source))
    for name, entries in chain.between:
        module, rows = model.get_submodule(name), _spread(source, entries)
        _take_rows_(module, ("weight", "bias", "running_mean", "running_var"), rows)
        if isinstance(module, _BatchNorm):
            module.num_features = len(rows)
        else:
            _resize_(module, "out", len(rows))
            _resize_(module, "in", len(rows))
            cast("nn.Conv2d", module).groups = len(rows)
    name, entries = chain.reader
    reader, columns = model.get_submodule(name), _spread(source, entries)
    weight = _weight(model, name)
    wide = weight.detach()[:, columns]
    share = 1.0 + UNEVEN * (2.0 * torch.rand(wide.shape, generator=generator) - 1.0).to(weight)
    share[:, weight.shape[1] :] *= FAINT  # the first columns are what was there
    where = columns.to(weight.device)
    total = torch.zeros_like(weight).index_add_(1, where, share)  # over the copies of each column
    reader.weight = nn.Parameter(wide * share / total[:, where], weight.requires_grad)
    _resize_(reader, "in", len(columns))


def _spread(source: Tensor, entries: int) -> Tensor:
    return (source[:, None] * entries + torch.arange(entries)).flatten()


def _take_rows_(module: nn.Module, names: tuple[str, ...], rows: Tensor) -> None:
    for name in names:
        value = getattr(module, name, None)
        if value is None:
            continue
        taken = value.detach()[rows].clone()
        setattr(module, name, nn.Parameter(taken, value.requires_grad) if isinstance(value, nn.Parameter) else taken)


def _resize_(module: nn.Module, side: str, width: int) -> None:
    setattr(module, f"{side}_{'features' if isinstance(module, nn.Linear) else 'channels'}", width)


def _weight(model: nn.Module, name: str) -> Tensor:
    return cast("Tensor", model.get_submodule(name).weight)


def _may_change(model: nn.Module, chain: _Chain, only: Collection[str]) -> bool:
    weighted = (name for name in chain.layers if not isinstance(model.get_submodule(name), _BatchNorm))
    return all(name in only for name in weighted)


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors the model returns, in eval mode; its modes are left as they were."""
    with eval_mode(model), torch.no_grad():
        output = call_with(model, inputs)
    values = output.values() if isinstance(output, Mapping) else as_tuple(output)
    return [value for value in values if isinstance(value, Tensor)]


def _chains(model: nn.Module, inputs: Any) -> list[_Chain]:
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n] = tuple(value.shape)
            return value

    try:
        graph = fx.Tracer().trace(model)
        _run(cast("nn.Module", _Called(Shapes(fx.GraphModule(model, graph)), model)), inputs)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AutopruneError(
            f"the model cannot be widened, because torch.fx cannot trace it: {told} Set factor to 1."
        ) from error
    walk = _Walk(model, graph, shapes)
    return [chain for node in graph.nodes if (chain := walk.chain(node))]


class _Called(nn.Module):
    """An interpreter as a module, so that the modules it calls are put in eval mode and back."""

    def __init__(self, interpreter: fx.Interpreter, model: nn.Module) -> None:
        super().__init__()
        self.interpreter, self.model = interpreter, model

    def forward(self, *inputs: Any) -> Any:
        return self.interpreter.run(*inputs)


class _Walk:
    """Follows channels through a traced model."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: Mapping[fx.Node, tuple[int, ...]]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.shapes = shapes
        called = [self.modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(map(id, called))
        self.owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.owners.update(id(self._attribute(n)) for n in graph.nodes if n.op == "get_attr")

    def _attribute(self, node: fx.Node) -> Any:
        path, _, name = str(node.target).rpartition(".")
        return getattr(self.modules[path], name, None)

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node calls, if that runs once and its parameters are its own."""
        if node.op != "call_module":
            return None
        module = self.modules[str(node.target)]
        own = all(self.owners[id(parameter)] == 1 for parameter in module.parameters())
        return module if self.calls[id(module)] == 1 and own else None

    def chain(self, node: fx.Node) -> _Chain | None:
        writer = self.module(node)
        if not _is_layer(writer) or node not in self.shapes:
            return None
        images = isinstance(writer, nn.Conv2d)
        if images and len(self.shapes[node]) != 4:
            return None
        between: list[tuple[str, int]] = []
        entries = 1  # of a channel along the axis it is on
        at = node
        while len(at.users) == 1:
            following = next(iter(at.users))
            if following.all_input_nodes != [at] or at not in self.shapes or following not in self.shapes:
                return None
            module, shape, after = self.module(following), self.shapes[at], self.shapes[following]
            if _is_layer(module):
                fits = images if isinstance(module, nn.Conv2d) else not images
                reader = (str(following.target), entries)
                return _Chain(str(node.target), tuple(between), reader) if fits else None
            if self._flattens(following, module):
                if not images or entries != 1 or len(after) != 2:
                    return None
                images, entries = False, shape[2] * shape[3]
            elif isinstance(module, _BatchNorm) and (images or len(shape) == 2):
                between.append((str(following.target), entries))
            elif images and _is_depthwise(module):
                between.append((str(following.target), 1))
            elif not self._is_channelwise(following, images):
                return None
            at = following
        return None

    def _flattens(self, node: fx.Node, module: nn.Module | None) -> bool:
        if isinstance(module, nn.Flatten):
            return module.start_dim == 1 and module.end_dim == -1
        if node.op in ("call_function", "call_method") and node.target in (torch.flatten, "flatten"):
            given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
            return bool(given.get("start_dim") == 1 and given.get("end_dim", -1) == -1)
        return False

    def _is_channelwise(self, node: fx.Node, images: bool) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return isinstance(module, _ANYWHERE) or (images and isinstance(module, _IMAGES))
        if node.op not in ("call_function", "call_method"):
            return False
        if node.target in (torch.mean, "mean"):  # over the positions
            over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return images and _is_positions(over) and bool(node.kwargs.get("keepdim", node.args[2:3] == (True,)))
        return node.target in _FUNCTIONS or (images and node.target in _IMAGE_FUNCTIONS)


def _is_positions(over: Any) -> bool:
    return isinstance(over, (tuple, list)) and sorted(d % 4 for d in over if isinstance(d, int)) == [2, 3]


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _is_depthwise(module: nn.Module | None) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    return 1 < module.groups == module.in_channels == module.out_channels
