"""A surrogate of one task's evaluation: a score in microseconds, fitted to plans that were really evaluated.

score = dense - range * (1 - exp(-z)),  z = sum over layers of exp(a_l) * loss_l(s_l) + exp(b_l) * error_l(s_l)^2

The curves are those the agent sees; a_l and b_l are what they fail to say of each layer. Latency is the table's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from autoprune.envs.curves import Array
from autoprune.envs.problem import Problem
from autoprune.errors import AutopruneError
from autoprune.evaluation.measurement import Evaluate, Measurement
from autoprune.plan import Plan

HELD_BACK = 0.2  # of the plans: those the error is told by
FEWEST = 10
_PRIOR = 0.02  # holds the layers' coefficients together where plans say little
_BOUND = 6.0  # of a and b
_FLOOR = 0.02  # a drop is fitted relative to itself and this: plans that lose little matter most


@dataclass(frozen=True, eq=False)
class Surrogate(Evaluate):
    """Callable: plan -> Measurement.

    Attributes:
        coefficients: exp(a) and exp(b), (2, layers).
        range: the most the score can drop.
        error: mean absolute error of the score on plans that were held back.
        rank: Spearman's correlation on them, in [-1, 1].
    """

    problem: Problem
    coefficients: Array
    range: float
    error: float
    rank: float

    def __call__(self, plan: Plan) -> Measurement:
        table = self.problem.table
        lost = float((self.coefficients * _features(self.problem, plan)).sum())
        latency_ms = table.predict_ms(plan)
        score = self.problem.dense_score - self.range * (1.0 - np.exp(-lost))
        return Measurement(float(score), latency_ms, table.dense_ms / latency_ms)


def _features(problem: Problem, plan: Plan) -> Array:
    """Loss and squared error of every layer as the plan has it, (2, layers)."""
    lost, error = problem.curves.plan_lost(plan)
    return np.stack([lost, error**2])


def fit_surrogate(problem: Problem, plans: Sequence[Plan], scores: Sequence[float]) -> Surrogate:
    """Fits to evaluated plans; a fifth of them, evenly spread, is held back to tell the error by.

    Raises:
        AutopruneError: too few plans.
    """
    if len(plans) < FEWEST:
        raise AutopruneError(f"a surrogate is fitted to {FEWEST} evaluated plans or more, not {len(plans)}.")
    x = torch.from_numpy(np.stack([_features(problem, plan) for plan in plans]))  # (plans, 2, layers)
    drop = problem.dense_score - torch.tensor(list(scores), dtype=torch.float64)
    back = torch.arange(len(plans)) % round(1 / HELD_BACK) == round(1 / HELD_BACK) - 1
    coefficients, reach = _fit(x[~back], drop[~back])
    predicted = reach * (1.0 - torch.exp(-(x[back] * coefficients).sum((1, 2))))
    error = float((predicted - drop[back]).abs().mean())
    varied = float(drop[back].std()) > 0 and float(predicted.std()) > 0
    rank = float(spearmanr(predicted.numpy(), drop[back].numpy()).statistic) if varied else 0.0
    return Surrogate(problem, coefficients.numpy(), float(reach), error, rank)


def _fit(x: torch.Tensor, drop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(a) and exp(b), (2, layers), and the range."""
    logs = torch.full(x.shape[1:], -1.0, dtype=torch.float64, requires_grad=True)  # a and b
    share = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the room above the worst drop seen
    worst = float(drop.max().clamp(min=0.05))
    optimizer = torch.optim.LBFGS([logs, share], max_iter=200, line_search_fn="strong_wolfe")
    scale = 1.0 / (_FLOOR + drop.abs())

    def bounded() -> tuple[torch.Tensor, torch.Tensor]:
        return (_BOUND * torch.tanh(logs / _BOUND)).exp(), worst * (1.0 + share.sigmoid())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        coefficients, reach = bounded()
        predicted = reach * (1.0 - torch.exp(-(x * coefficients).sum((1, 2))))
        fitted = torch.nn.functional.smooth_l1_loss(predicted * scale, drop * scale, beta=0.3)
        loss = fitted + _PRIOR * (logs - logs.mean(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    coefficients, reach = bounded()
    return coefficients.detach(), reach.detach()
