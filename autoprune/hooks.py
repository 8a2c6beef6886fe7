"""Any training method in a user's own loop: three calls, and the optimizer's own step hooks for what lies between."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.allocation import Cost, WeightCost
from autoprune.checks import check_counts
from autoprune.criteria import CRITERIA
from autoprune.envs.projection import check_movable
from autoprune.errors import AutopruneError
from autoprune.masks import Batches, Loss, Masks
from autoprune.model.inventory import Inventory, check_patterns, take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.pipeline.retarget import faster_than_eager, latency_table, plan_at
from autoprune.plan import LayerPlan, Plan
from autoprune.quantization import unrounded
from autoprune.registry import Choice
from autoprune.target import Over, Target
from autoprune.training import TRAINING, Pruner, Signals
from autoprune.training.distributed import Alike
from autoprune.training.lifecycle import Event, Lifecycle
from autoprune.training.widening import make_pruner_


class PruningHooks:
    """Prunes a model while you train it.

    Make it before the optimizer, and before any wrapper such as DistributedDataParallel: some methods widen the model.

        pruning = PruningHooks(model, images, "adaptive", sparsity=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruning.start(optimizer, total_steps=epochs * len(loader))
        for images, labels in epochs_of(loader):
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            pruning.after_step()
        masks = pruning.finish()
        fast = autoprune.repack(model.eval(), images[:1])

    Gradient accumulation, ``optimizer.step(closure)``, autocast and gradient scaling work as they are. With several
    processes (torch's default group) every one makes its own hooks, with the same arguments, and all end with the same
    masks: the first process's seed and batch norm statistics are everyone's while the method works.

    Args:
        model: trained in place; on the CPU.
        example_inputs: as the model is called; see `Arguments`.
        method: a training method's name, or a `Choice` with its arguments.
        sparsity: of every prunable layer, in (0, 1). Methods that find the layers' shares spend the same budget.
        speedup: in place of it: on one thread, at the batch of `example_inputs`, as the latency table predicts; the
            budget is then in milliseconds.
        over: what that is over: ``best``, the best dense engine here (when left out), ``repacked`` or ``eager``.
        table: the latency table's file: read when it is there, else measured (minutes) and written, with the engines'
            times beside it. When left out, both are kept in the user's cache.
        plan: in place of `sparsity`, `pattern` and `criterion`, e.g. one that an agent found.
        pattern: a name or a `Choice`; groups of 8 filters when left out.
        criterion: a name or a `Choice`.
        keep_dense: glob patterns of layer names.
        batches: a few calibration batches ``(inputs, target)``, for criteria and methods that read statistics; the
            same in every process.
        loss: ``loss(model(*inputs), target)`` is a scalar; read with `batches`.
        cost: inventory -> what the budget counts; when left out, milliseconds for a speed-up, else the weights left.

    Raises:
        ConfigError: no such method, pattern, criterion or argument, or a sparsity or a speed-up out of range.
        InfeasibleTarget: the speed-up is out of reach; the message has the best there is.
        AutopruneError: nothing can be pruned, the plan does not fit the model, a target too many, or a layer to prune
            whose weight is no parameter that is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        method: str | Choice = "gradual",
        *,
        sparsity: float | None = None,
        speedup: float | None = None,
        over: Over | None = None,
        table: Path | str | None = None,
        plan: Plan | None = None,
        pattern: str | Choice = Choice("group", {"size": 8}),  # noqa: B008 - frozen
        criterion: str | Choice = "magnitude",
        keep_dense: Sequence[str] = (),
        batches: Batches = (),
        loss: Loss = functional.cross_entropy,
        cost: Callable[[Inventory], Cost] | None = None,
    ) -> None:
        if sum(given is not None for given in (sparsity, speedup, plan)) != 1:
            raise AutopruneError("give a sparsity, a speedup or a plan: exactly one of them says how much to prune.")
        if speedup is None and (table is not None or over is not None):
            raise AutopruneError("table and over are for a speedup alone: leave them out, or give a speedup.")
        if plan is None:  # the range is checked before anything that takes a while
            target = Target(speedup=speedup, sparsity=sparsity, over=over or "best")
        self._name, self._method = Choice.of(method), TRAINING.create(Choice.of(method))
        self._lifecycle = Lifecycle()
        inventory = _inventory(model, example_inputs, keep_dense)
        counted: Callable[[Inventory], Cost] = WeightCost
        if plan is None:
            layer = LayerPlan(sparsity or 0.0, Choice.of(pattern), Choice.of(criterion))
            plan = Plan(dict.fromkeys(inventory.names, layer), Choice.of(method))
            PATTERNS.create(layer.pattern)
            CRITERIA.create(layer.criterion)
        if speedup is not None:
            check_movable(layer.pattern)  # before the table, which takes a while
            file = None if table is None else Path(table)
            measured = latency_table(model, example_inputs, inventory, layer.pattern, file)
            baseline = faster_than_eager(model, example_inputs, target.over, file)
            plan, counted = plan_at(measured, inventory, layer, Choice.of(method), target, baseline)
        plan.check_layers(inventory.names)
        _check_trainable(model, [name for name, layer in plan.layers.items() if layer.sparsity > 0.0])
        self._pruner = make_pruner_(
            self._method, model, inventory, plan, example_inputs, batches, loss, cost or counted
        )

    @property
    def plan(self) -> Plan:
        """What is asked for, layer by layer; of the widened model where the method widens."""
        return self._pruner.plan

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Prepares for `total_steps` steps of `optimizer`, which trains the model; may cut already.

        Raises:
            AutopruneError: called twice, `total_steps` below 1, or an optimizer of other parameters.
        """
        self._lifecycle.check(Event.START)
        check_counts("PruningHooks.start", {"total_steps": total_steps})
        _check_trains(optimizer, self._pruner)
        self._alike = Alike(self._pruner.model, reads_data=bool(self._pruner.batches))
        with self._alike(0):
            self._method.start(self._pruner, total_steps)
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._lifecycle.start(type(optimizer).__name__, total_steps)

    def after_step(self) -> None:
        """Follows every ``optimizer.step()``, those that a gradient scaler skipped included.

        Raises:
            AutopruneError: more steps were taken than `start` was told, so that the masks are final already.
        """
        step = self._lifecycle.count()
        with self._alike(2 * step):
            self._method.after_step(step)

    def finish(self) -> Masks:
        """The final masks, True keeps; the model's weights are zero where they cut. The hook is removed.

        Raises:
            AutopruneError: fewer steps were taken than `start` was told, so the budget is not met yet.
        """
        self._lifecycle.check(Event.FINISH)
        self._hook.remove()
        return self._method.finish()

    def signals(self) -> Signals:
        """Figures and histograms of the present state, for your own logger."""
        self._lifecycle.check(Event.READ)
        return self._method.signals()

    def state_dict(self) -> dict[str, Tensor]:
        """What to keep, besides the model and the optimizer, to go on later; tensors only."""
        self._lifecycle.check(Event.READ)
        state = self._method.state()
        figures = {"step": self._lifecycle.step, "made": self._made, "entries": len(state)}
        return {**state, **{f"hooks.{name}": torch.tensor(figure) for name, figure in figures.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back a `state_dict`; after `start`, and after the model and the optimizer have theirs.

        Raises:
            AutopruneError: the state is damaged, or of hooks made with other arguments.
        """
        self._lifecycle.check(Event.READ)
        inner, made, step = _parts(state)
        if made != self._made:
            raise AutopruneError(
                "the state is of hooks that were made otherwise: another method, plan, model or total_steps. With a "
                "speedup, give the same latency table: one that is measured anew leads to another plan."
            )
        if not 0 <= step <= self._lifecycle.total:
            raise AutopruneError(f"the state is damaged: it is of step {step}, of {self._lifecycle.total}.")
        try:
            self._method.resume(inner)
        except (AutopruneError, KeyError, RuntimeError) as error:
            raise AutopruneError(f"the state is damaged: {error}.") from None
        self._lifecycle.go_to(step)

    @property
    def _made(self) -> int:
        """A number that tells hooks apart whose states do not fit each other."""
        shapes = [layer.weight_shape for layer in self._pruner.inventory.layers]
        text = f"{self._name}/{self.plan.key}/{shapes}/{self._lifecycle.total}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise AutopruneError(
                "a fused optimizer unscales the gradients inside its step, where the pruning cannot see them: make it "
                "with fused=False, or call scaler.unscale_(optimizer) before scaler.step(optimizer)."
            )
        loss = next(iter([*args[1:], *kwargs.values()]), None)  # args[0] is the optimizer
        if loss is None:
            self._see_gradients()
            return None

        def closure() -> Any:
            """The gradients come into being here, inside the step."""
            self._lifecycle.check(Event.GRADIENTS)
            with torch.enable_grad():
                value = loss()
            self._see_gradients()
            self._lifecycle.take(Event.GRADIENTS)
            return value

        return (optimizer, closure), {}

    def _see_gradients(self) -> None:
        step = self._lifecycle.step
        with self._alike(2 * step + 1):
            self._method.before_step(step + 1)


def _check_trainable(model: nn.Module, names: Sequence[str]) -> None:
    """Raises AutopruneError where a mask on a layer's weight would not hold, or the layer could not recover."""
    weights = {name: weight_of(model, name) for name in names}
    if computed := [name for name, weight in weights.items() if not isinstance(weight, nn.Parameter)]:
        raise AutopruneError(
            f"the weight of {', '.join(computed[:3])} is computed from other tensors (weight or spectral norm, another "
            "tool's mask), so that what is cut would come back. Make it plain, before the optimizer is made, with "
            "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove or remove_weight_norm; or "
            "leave the layer whole (keep_dense)."
        )
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise AutopruneError(
            f"{', '.join(frozen[:3])} would be pruned and never trained: requires_grad is False. Let it be trained, or "
            "leave the layer whole (keep_dense)."
        )


def _check_trains(optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    """Raises AutopruneError where the optimizer leaves a pruned layer as it is."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name in pruner.layers if id(pruner.weight(name)) not in trained]:
        raise AutopruneError(
            f"the optimizer does not train {', '.join(missing[:3])}: make the hooks first (a method may widen the "
            "model), then the optimizer from model.parameters()."
        )


def _inventory(model: nn.Module, example_inputs: Any, keep_dense: Sequence[str]) -> Inventory:
    """What can be pruned, of a model that may be fake-quantised."""
    with unrounded():
        inventory = take_inventory(model, example_inputs, keep_dense=keep_dense)
    check_patterns(keep_dense, inventory)
    return inventory


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, int]:
    """The method's state, the number that tells hooks apart, and the step.

    Raises AutopruneError where `state` is no state of hooks, or tensors of it are lost.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AutopruneError(f"a state of pruning hooks maps names to tensors, not {state!r:.60}.")
    inner, figures = dict(state), []
    for name in ("hooks.made", "hooks.step", "hooks.entries"):
        figure = inner.pop(name, None)
        if figure is None or figure.dtype != torch.int64 or figure.numel() != 1:
            raise AutopruneError(f"this is not a state of pruning hooks: it has no number {name!r}.")
        figures.append(int(figure))
    made, step, entries = figures
    if len(inner) != entries:
        raise AutopruneError(f"the state is damaged: it has {len(inner)} tensors, of {entries}.")
    return inner, made, step
