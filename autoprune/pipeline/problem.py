"""What a search is about: the layers, their curves and the target, as a problem and as episodes, and who evaluates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoprune.envs import Problem, PruneEnv
from autoprune.envs.actions import ActionSpace
from autoprune.envs.limits import FileSize
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.measurement import (
    ByTable,
    CachedEvaluate,
    Evaluate,
    Evaluated,
    Failure,
)
from autoprune.evaluation.pool import Pool, ProcessPool
from autoprune.evaluation.ray_pool import RayPool
from autoprune.evaluation.sensitivity import Sensitivity, probe_sensitivity
from autoprune.identity.claim import Claim
from autoprune.latency.table import LatencyTable
from autoprune.metric import Metric
from autoprune.model.inventory import Inventory
from autoprune.pipeline.baselines import Baselines
from autoprune.pipeline.preparation import Context
from autoprune.plan import Plan


class Unscored(Evaluate):
    """Of a problem whose plans nobody scores."""

    def __call__(self, plan: Plan) -> Evaluated:
        return Failure("nothing scores the plans of this problem")


@dataclass(frozen=True)
class SearchProblem:
    """What is searched, and who evaluates.

    Attributes:
        problem: the layers, their curves and the target; its evaluation remembers what `workers` found.
        evaluator: of a single plan, in this process.
        workers: evaluate many plans at once; the search ends them.
        evaluations: what they found, remembered.
    """

    problem: Problem
    evaluator: Evaluator
    workers: Pool
    evaluations: CachedEvaluate

    @property
    def metric(self) -> Metric:
        return self.evaluator.subject.task.metric


def pose_problem(context: Context, evaluator: Evaluator, unscored: Problem) -> SearchProblem:
    """Makes the search's problem, and claims the directory of the search for the device.

    Args:
        context: of the run.
        evaluator: of a plan.
        unscored: the target and the layers a plan decides.

    Raises:
        ConfigError: the trials that are there were measured on another machine.
    """
    env, directory = context.config.env, context.directory
    machine = {"the machine": {key: str(value) for key, value in context.device.identity().items()}}
    claim = Claim(directory / "search")  # a table measured anew makes no older trial as good
    claim.check(machine)
    claim.write(machine)
    sensitivity = probe_sensitivity(
        evaluator.subject,
        unscored.inventory.names,
        env.pattern,
        env.criterion,
        path=directory / "sensitivity.json",
        progress=context.progress,
    )
    workers = worker_pool(context, evaluator)
    evaluations = CachedEvaluate(workers, directory / "search" / "evaluations.jsonl")
    evaluate = evaluations if context.measures else ByTable(evaluations, evaluator.table)
    return SearchProblem(replace(unscored, sensitivity=sensitivity, evaluate=evaluate), evaluator, workers, evaluations)


def build_problem(
    context: Context,
    dense_score: float,
    offered: Inventory,
    table: LatencyTable,
    sensitivity: Sensitivity,
    evaluate: Evaluate,
    baselines: Baselines | None,
) -> Problem:
    """The config's target and choices for these layers; other arguments are those of `Problem`.

    The baselines are None where the target is over none of them.
    """
    config, env = context.config, context.config.env
    return Problem(
        inventory=offered,
        table=table,
        sensitivity=sensitivity,
        dense_score=dense_score,
        evaluate=evaluate,
        target=config.target,
        pattern=env.pattern,
        criterion=env.criterion,
        training=config.finetune.method,
        max_sparsity=env.max_sparsity,
        baseline_speedup=1.0 if baselines is None else baselines.over_reference(config.target.over),
        file=FileSize() if baselines is None else file_size(context, offered, baselines),
        precision=config.precision,
        reference="eager" if context.device.runs_torch else "repacked",
    )


def file_size(context: Context, inventory: Inventory, baselines: Baselines) -> FileSize:
    """What is known of the size of a packed file in which these layers are pruned."""
    weights = sum(layer.weights for layer in inventory.layers)
    in_bytes = context.config.precision in ("int8", "mixed")
    return baselines.file_size(weights, 8 if in_bytes else context.config.repack.value_bits)


def build_env(context: Context, problem: Problem) -> PruneEnv:
    """The problem as episodes.

    Raises:
        InfeasibleTarget: no plan can reach the target.
    """
    env = context.config.env
    actions = ActionSpace(list(zip(env.actions, context.choices.actions, strict=True)))
    return PruneEnv(problem, actions, env.shaping, env.gamma, env.start, env.curves)


def worker_pool(context: Context, evaluator: Evaluator) -> Pool:
    """Workers that evaluate as `evaluator` does, each with its share of the threads."""
    if context.ray is not None:
        return RayPool(replace(evaluator, work_threads=1), context.ray)
    each = replace(evaluator, work_threads=max(1, context.work_threads // context.workers))
    return ProcessPool(evaluator, context.workers, each)
