"""The checks that `autoprune.testing` ships: each fails for a member that breaks a law, and says which."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from autoprune.agents import Agent
from autoprune.agents.random import RandomAgent
from autoprune.allocation import Allocation, Layers
from autoprune.allocation.uniform import Uniform
from autoprune.criteria import Criterion, LayerStatistics
from autoprune.criteria.magnitude import Magnitude
from autoprune.envs import PruneEnv
from autoprune.errors import AutopruneError
from autoprune.evaluation.recovery import Recovery, Subject
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.patterns import Pattern
from autoprune.patterns.channel import Channel
from autoprune.patterns.unstructured import Unstructured
from autoprune.plan import Plan
from autoprune.repack import LayerForm
from autoprune.repack.modules.backends import Backend, Support
from autoprune.testing import (
    BrokenLaw,
    check_agent,
    check_allocation,
    check_backend,
    check_criterion,
    check_method,
    check_pattern,
    check_recovery,
)
from autoprune.training import SparseTraining
from autoprune.training.gradual import Gradual
from autoprune.training.one_shot import OneShot


def named(value: object) -> str | None:
    """Members by their class, laws as they are."""
    return None if isinstance(value, str) else type(value).__name__


class KeepsNothing(Unstructured):
    def select(self, saliency: Tensor, sparsity: float, cells: Tensor) -> Tensor:
        return torch.zeros_like(saliency, dtype=torch.bool)


class HasGaps(Unstructured):
    def cells(self, shape: tuple[int, ...], conv_groups: int = 1) -> Tensor:
        return 2 * super().cells(shape, conv_groups)


class KeepsTooMuch(Unstructured):
    def select(self, saliency: Tensor, sparsity: float, cells: Tensor) -> Tensor:
        return super().select(saliency, sparsity / 2, cells)


class RefusesItsOwn(Unstructured):
    def check(self, mask: Tensor, conv_groups: int = 1) -> bool:
        return bool(mask.all())


class AllowsEverything(Channel):
    def check(self, mask: Tensor, conv_groups: int = 1) -> bool:
        return True


class Draws(Unstructured):
    def select(self, saliency: Tensor, sparsity: float, cells: Tensor) -> Tensor:
        return super().select(torch.rand_like(saliency), sparsity, cells)


class MaskOfFloats(Unstructured):
    def select(self, saliency: Tensor, sparsity: float, cells: Tensor) -> Tensor:
        return super().select(saliency, sparsity, cells).float()


@pytest.mark.parametrize(
    ("pattern", "law"),
    [
        (KeepsNothing(), "keeps at least one cell"),
        (HasGaps(), "from 0 without a gap"),
        (KeepsTooMuch(), "has the sparsity that `feasible` says"),
        (RefusesItsOwn(), "passes its own masks"),
        (AllowsEverything(), "refuses masks that keep a part of a cell"),
        (Draws(), "makes the same mask every time"),
        (MaskOfFloats(), "returns a bool mask"),
    ],
    ids=named,
)
def test_a_broken_pattern_is_found(pattern: Pattern, law: str) -> None:
    with pytest.raises(BrokenLaw, match=f"^{type(pattern).__name__} breaks a law: it .*{law}"):
        check_pattern(pattern)


class BySign(Magnitude):
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return weight.detach()


class Infinite(Magnitude):
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return 1.0 / torch.zeros_like(weight)


class OfFilters(Magnitude):
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return weight.detach().abs().flatten(1).mean(1)


class ByLuck(Magnitude):
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return torch.rand(weight.shape)


class WorksInPlace(Magnitude):
    def saliency(self, weight: Tensor, statistics: LayerStatistics, conv_groups: int = 1) -> Tensor:
        return weight.detach().abs_().clone()


class NeedsMore(Magnitude):
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})


@pytest.mark.parametrize(
    ("criterion", "law"),
    [
        (BySign(), "returns scores >= 0"),
        (Infinite(), "returns finite scores"),
        (OfFilters(), "in the weight's shape"),
        (ByLuck(), "the same scores every time"),
        (WorksInPlace(), "leaves the weights as they were"),
        (NeedsMore(), "needs statistics among"),
    ],
    ids=named,
)
def test_a_broken_criterion_is_found(criterion: Criterion, law: str) -> None:
    with pytest.raises(BrokenLaw, match=law):
        check_criterion(criterion)


class Changed(Allocation):
    """The uniform rule, changed by a function of (what it found, the layers, the fraction)."""

    def __init__(self, change: Callable[[dict[str, float], Layers, float], Mapping[str, float]]) -> None:
        self.change = change

    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        return dict(self.change(Uniform().sparsities(layers, fraction), layers, fraction))


class SharesOneSparsity(Allocation):
    def sparsities(self, layers: Layers, fraction: float = 1.0) -> dict[str, float]:
        names = list(layers.planned(fraction))
        return layers.meet(lambda sparsity: dict.fromkeys(names, sparsity * 0.999), fraction)


@pytest.mark.parametrize(
    ("allocation", "law"),
    [
        (
            Changed(lambda found, layers, _: {**dict.fromkeys(layers.inventory.names, 0.0), **found}),
            "leaves out layers",
        ),
        (Changed(lambda found, *_: dict.fromkeys(found, 1.0)), r"has sparsities in \[0, 1\)"),
        (Changed(lambda found, *_: {name: share / 2 for name, share in found.items()}), "stays within the budget"),
        (Changed(lambda found, *_: {name: (1 + share) / 2 for name, share in found.items()}), "cuts nothing at|spends"),
        (Changed(lambda found, _, f: dict.fromkeys(found, 0.99 - 0.1 * f)), "cuts no layer less as the fraction"),
        (SharesOneSparsity(), "raises ConfigError for a pattern that allows one sparsity"),
    ],
    ids=range(6),
)
def test_a_broken_allocation_is_found(allocation: Allocation, law: str) -> None:
    with pytest.raises(BrokenLaw, match=law):
        check_allocation(allocation)


class LetsGrow(OneShot):
    def after_step(self, step: int) -> None:
        pass


class StopsHalfWay(OneShot):
    def start(self, pruner: Any, total_steps: int) -> None:
        self.pruner, self.masks = pruner, pruner.masks(0.5)
        pruner.apply_(self.masks)


class Freezes(OneShot):
    def before_step(self, step: int) -> None:
        for parameter in self.pruner.model.parameters():
            parameter.grad = None


class CutsMoreThanItSays(OneShot):
    def after_step(self, step: int) -> None:
        super().after_step(step)
        with torch.no_grad():
            self.pruner.weight("5")[0] = 0.0


class Forgets(Gradual):
    """Takes nothing back: after a kill it cuts again from nothing."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {}


class Unlike(OneShot):
    """No two trainings alike."""

    made = 0

    def before_step(self, step: int) -> None:
        Unlike.made += 1
        for parameter in self.pruner.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 1.0 + 0.01 * Unlike.made


class SharesWhatCannotBeShared(OneShot):
    def __init__(self) -> None:
        self.allocation, self.finds_shares = SharesOneSparsity(), True


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (LetsGrow, "leaves at zero what its masks cut"),
        (StopsHalfWay, "brings layer"),
        (Freezes, "lets the kept weights train"),
        (CutsMoreThanItSays, "leaves nothing at zero but what its masks cut"),
        (Forgets, "resumes a killed training bit for bit"),
        (Unlike, "gives the same weights for the same seed"),
        (SharesWhatCannotBeShared, "refuses, as it finds layers' shares"),
    ],
)
def test_a_broken_method_is_found(method: Callable[[], SparseTraining], law: str) -> None:
    with pytest.raises(BrokenLaw, match=law):
        check_method(method)


class Fills(NoRecovery):
    """Masks, and moves all weights, those that are cut too."""

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        super().recover_(model, plan, subject)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)


class CutsThePlansOthers(NoRecovery):
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        super().recover_(model, plan, subject)
        with torch.no_grad():
            model.get_parameter("5.weight")[:3] = 0.0


class LeavesEvalMode(NoRecovery):
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        super().recover_(model.eval(), plan, subject)


class TouchesTheDenseModel(NoRecovery):
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        super().recover_(model, plan, subject)
        with torch.no_grad():
            subject.dense.get_parameter("5.bias").add_(1.0)


class Noisy(NoRecovery):
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        super().recover_(model, plan, subject)
        with torch.no_grad():
            model.get_parameter("5.bias").normal_()


@pytest.mark.parametrize(
    ("recovery", "law"),
    [
        (Fills(), "leaves layer 0 as sparse as planned"),
        (CutsThePlansOthers(), "cuts no layer that the plan leaves out"),
        (LeavesEvalMode(), "leaves the model's mode"),
        (TouchesTheDenseModel(), "leaves the dense model alone"),
        (Noisy(), "gives the same weights every time"),
    ],
    ids=named,
)
def test_a_broken_recovery_is_found(recovery: Recovery, law: str) -> None:
    with pytest.raises(BrokenLaw, match=law):
        check_recovery(recovery)


class Seedless(RandomAgent):
    made = 0

    def search(self, env: PruneEnv, episodes: int, seed: int, *args: Any) -> None:
        Seedless.made += 1
        super().search(env, episodes, Seedless.made, *args)


class Exceeds(RandomAgent):
    def search(self, env: PruneEnv, episodes: int, *args: Any) -> None:
        super().search(env, episodes + 1, *args)


class StartsAnew(RandomAgent):
    """Plays all episodes again after a kill, and counts them twice."""

    def search(self, env: PruneEnv, episodes: int, seed: int, on_trial: Any, directory: Path | None, done: int) -> None:
        super().search(env, episodes, seed, on_trial, directory, 0)


@pytest.mark.parametrize(
    ("agent", "law"),
    [
        (Seedless, "makes the same trials for the same seed"),
        (Exceeds, "reports from 1 to 27 trials"),
        (StartsAnew, "resumes a killed search"),
    ],
)
def test_a_broken_agent_is_found(agent: Callable[[], Agent], law: str) -> None:
    with pytest.raises(BrokenLaw, match=law):
        check_agent(agent)


class Lowers(Backend):
    """The layer as it is, changed by a function of it, its ReLU and the input."""

    def __init__(self, run: Callable[[nn.Module, bool, Tensor], Tensor]) -> None:
        self.run = run

    def supports(self, form: LayerForm) -> Support:
        return Support(True)

    def lower(self, form: LayerForm) -> nn.Module:
        return Running(lambda x: self.run(form.module, form.relu, x))


class Running(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class SaysNothing(Backend):
    def supports(self, form: LayerForm) -> Support:
        return Support(False)

    def lower(self, form: LayerForm) -> nn.Module:
        raise AssertionError("is not asked")


def layer(module: nn.Module, relu: bool, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y.relu() if relu else y


@pytest.mark.parametrize(
    ("backend", "law"),
    [
        (Lowers(lambda module, _, x: module(x)), "computes what the layer does, ReLU True"),
        (Lowers(lambda module, relu, x: layer(module, relu, x) * 1.01), "computes what the layer does"),
        (Lowers(lambda module, relu, x: layer(module, relu, x.mul_(1.5))), "leaves the input as it was"),
        (Lowers(lambda module, relu, x: layer(module, relu, x).double()), "gives the layer's shape and type"),
        (SaysNothing(), "says why it cannot lower a layer"),
    ],
    ids=range(5),
)
def test_a_broken_backend_is_found(backend: Backend, law: str) -> None:
    with pytest.raises(BrokenLaw, match=law):
        check_backend(backend)


class ChangesTheLayer(Lowers):
    def lower(self, form: LayerForm) -> nn.Module:
        form.module.get_parameter("weight").data.add_(1.0)
        return Running(lambda x: layer(form.module, form.relu, x))


def test_a_whole_backend_is_fine_and_one_that_changes_the_layer_is_found() -> None:
    check_backend(Lowers(layer))
    with pytest.raises(BrokenLaw, match="leaves the layer as it was"):
        check_backend(ChangesTheLayer(layer))


def test_a_broken_law_is_a_failed_assertion_and_an_error_of_autoprunes() -> None:
    assert issubclass(BrokenLaw, AssertionError)
    assert issubclass(BrokenLaw, AutopruneError)


@pytest.mark.slow
def test_the_checks_need_no_test_framework() -> None:
    code = "import sys, autoprune.testing; assert not {'pytest', '_pytest', 'hypothesis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
