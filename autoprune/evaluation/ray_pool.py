"""Evaluation on a Ray cluster: plans are scored on any node and timed on the target device alone.

The one module that imports Ray. A node with the target device has the custom resource `DEVICE`, one for each of its
devices that may time at once: ``ray start --address=HEAD:6379 --resources '{"autoprune_device": 1}'``. A task whose
worker or node dies is run again by Ray, elsewhere if need be; what it was given and what it needs is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from autoprune.errors import AutopruneError, ConfigError, GivenError, NumericalError, StaleTable
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.measurement import Evaluated, Failure
from autoprune.evaluation.pool import Pool
from autoprune.extras import needs
from autoprune.latency.machine import differences
from autoprune.latency.quiet import working
from autoprune.plan import Plan
from autoprune.processes.workers import RETRIES

DEVICE = "autoprune_device"
LOCAL = "local"  # the address that starts a cluster of this machine


class RayPool(Pool):
    """Every plan is evaluated on the cluster: a task that scores it, then one that times it where `DEVICE` is.

    Args:
        evaluator: sent to each worker once.
        address: of the cluster, as `ray.init` takes it; ``local`` starts one on this machine.

    Raises:
        MissingExtra: Ray is not installed.
        ConfigError: there is no such cluster, or none of its nodes has the target device.
        AutopruneError: while evaluating: a plan's workers died again and again; or what a task raised.
    """

    def __init__(self, evaluator: Evaluator, address: str) -> None:
        self._ray = _imported()
        self._evaluator, self._address = evaluator, address
        self._sent: Any = None
        self._ours = False  # whether this pool made the connection
        self._score: Any = None
        self._time: Any = None

    def __call__(self, plan: Plan) -> Evaluated:
        return self.all([plan])[0]

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Evaluated]]:
        """Yields (index, measurement) in the order of completion."""
        if not plans:
            return
        self._connect()
        waiting: dict[Any, int] = {}
        for index, plan in enumerate(plans):
            score, model = self._score.remote([self._sent], plan)
            waiting[self._time.remote([self._sent], plan, score, model)] = index
        try:
            while waiting:
                (ready,), _ = self._ray.wait(list(waiting), num_returns=1)
                index = waiting.pop(ready)
                yield index, self._result(ready, plans[index])
        finally:
            for task in waiting:  # nobody waits for them any more
                self._ray.cancel(task, force=True)

    def _result(self, task: Any, plan: Plan) -> Evaluated:
        exceptions = self._ray.exceptions
        try:
            measured: Evaluated = self._ray.get(task)
        except exceptions.RayError as error:
            cause: Exception = error
            while isinstance(cause, exceptions.RayTaskError):  # of the timing, of the scoring, what was raised there
                cause = cause.cause
            if isinstance(cause, (GivenError, NumericalError)):
                return Failure(str(cause))
            if isinstance(cause, AutopruneError):
                raise cause from error
            if isinstance(cause, exceptions.RayError):
                raise AutopruneError(
                    f"{RETRIES + 1} workers of the Ray cluster died evaluating one plan ({cause}). The plan: {plan.key}"
                ) from error
            raise RuntimeError(f"a worker of the Ray cluster failed: {error}") from error
        return measured

    def _connect(self) -> None:
        """Finds the cluster, and sends it the evaluator."""
        if self._sent is not None:
            return
        ray = self._ray
        if not ray.is_initialized():
            _initialise(ray, self._address)
            self._ours = True
        if ray.cluster_resources().get(DEVICE, 0) < 1:
            self.close()
            raise ConfigError(
                f"no node of the Ray cluster has the target device. Start one there with: ray start "
                f"--address=HEAD:6379 --resources '{{\"{DEVICE}\": 1}}'"
            )
        self._sent = ray.put(self._evaluator)
        self._score = ray.remote(num_cpus=1, max_retries=RETRIES, num_returns=2)(_scored)
        self._time = ray.remote(num_cpus=1, max_retries=RETRIES, resources={DEVICE: 1})(_timed)

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
        self._sent = None
        if self._ours:
            self._ray.shutdown()
            self._ours = False


def _imported() -> Any:
    with needs("ray", "a Ray cluster"):
        import ray
        import ray.exceptions
    return ray


def _initialise(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "configure_logging": False}
    started: Mapping[str, Any] = {"resources": {DEVICE: 1}, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, **quiet, **started)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"there is no Ray cluster at {address!r} ({error}).") from error


def _scored(evaluator: Sequence[Any], plan: Plan) -> tuple[float, nn.Module]:
    """A task: the score, and the masked model, which the device repacks for itself."""
    ours = _fetched(evaluator[0])
    with working():
        model = ours.masked_model(plan)
        return ours.scored(model, plan)[0], model


def _timed(evaluator: Sequence[Any], plan: Plan, score: float, model: nn.Module) -> Evaluated:
    """A task of the target device."""
    ours = _fetched(evaluator[0])
    if ours.table.machine and (unlike := differences(ours.table.machine, ours.device.identity())):
        raise StaleTable(
            "the latency table was not measured on a machine like the cluster's target device: "
            f"{'; '.join(unlike)}. Start the run on such a machine."
        )
    with working():
        fast = ours.repacked(model, plan)
    return ours.measured(score, fast, plan)


@lru_cache(maxsize=1)  # a worker serves many tasks of one search
def _fetched(reference: Any) -> Evaluator:
    get: Callable[[Any], Evaluator] = _imported().get
    return get(reference)
