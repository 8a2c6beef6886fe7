"""Trials on a Ray cluster of two nodes: equal to local ones, timed on the node of the device, whoever is killed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import nn

from autoprune.errors import AutopruneError, ConfigError, MissingExtra
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.ray_pool import DEVICE, RayPool
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.recovery.base import Recovery
from autoprune.evaluation.recovery.train import Train
from autoprune.plan import Plan
from autoprune.testing import FakeClock
from tests.helpers import measured

try:
    with warnings.catch_warnings(action="ignore"):
        import ray
        import ray.exceptions
        from ray.cluster_utils import Cluster
except ImportError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="needs Ray: pip install 'autoprune[ray]'")
STEP_S = 2.0**-10  # as of the evaluator's clock


class KilledOnce(Recovery):
    """Trains; the process of the first plan that asks is killed in the middle of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        Train(2).recover_(model, plan, subject)
        before = list(self.folder.iterdir())
        (self.folder / str(os.getpid())).touch()
        if not before:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class ClockOfNodes(FakeClock):
    """Notes the node it is read on."""

    folder: Path = Path()

    def __call__(self) -> float:
        (self.folder / str(ray.get_runtime_context().get_node_id())).touch()
        return super().__call__()


class KilledAlways(Recovery):
    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes on this machine; the second one has the device."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1, resources={DEVICE: 1})
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import the tests
    yield
    ray.shutdown()
    made.shutdown()


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_loses_nothing_and_the_result_is_the_local_one(
    evaluator: Evaluator, plans: list[Plan], tmp_path: Path
) -> None:
    local = evaluator.all(plans)  # also tunes the kernels, so that the cluster's clock is read to time alone
    scored, timed = tmp_path / "scored", tmp_path / "timed"
    scored.mkdir()
    timed.mkdir()
    troubled = replace(evaluator, recovery=KilledOnce(scored), clock=ClockOfNodes(STEP_S, folder=timed))
    with RayPool(troubled, "auto") as pool:
        assert pool.all(plans) == local
        assert pool(plans[1]) == local[1]
    assert len({measured(outcome).score for outcome in local}) == len(plans)
    assert len(list(scored.iterdir())) >= 2
    devices = {node["NodeID"] for node in ray.nodes() if DEVICE in node["Resources"]}
    assert {path.name for path in timed.iterdir()} == devices
    assert ray.is_initialized(), "a connection that was there is left as it is"


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_plan_that_kills_every_worker_is_an_error(evaluator: Evaluator, plans: list[Plan]) -> None:
    with (
        RayPool(replace(evaluator, recovery=KilledAlways()), "auto") as pool,
        pytest.raises(AutopruneError, match="3 workers of the Ray cluster died"),
    ):
        pool.all(plans[:1])


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_table_of_another_machine_is_refused_by_the_device(evaluator: Evaluator, plans: list[Plan]) -> None:
    other = replace(evaluator, table=replace(evaluator.table, machine={"cpu": "another"}))
    with RayPool(other, "auto") as pool, pytest.raises(AutopruneError, match="not measured on a machine like"):
        pool.all(plans[:1])


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_the_device_is_refused(
    evaluator: Evaluator, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    with RayPool(evaluator, "auto") as pool, pytest.raises(ConfigError, match=r"ray start .*autoprune_device"):
        pool.all(plans[:1])


def test_without_ray_the_command_is_said(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install .autoprune\[ray\]"):
        RayPool(evaluator, "auto")
