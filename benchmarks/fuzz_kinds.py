"""The kinds of files that autoprune reads: a real sample of each, made by the product, and the product's own reader."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune.agents import AGENTS
from autoprune.agents.checkpoint import checkpoint_episodes, load_checkpoint_
from autoprune.agents.harness import TrialLog, search
from autoprune.agents.policy import Policy
from autoprune.agents.sb3 import SB3Agent
from autoprune.config import load_config, parse_config
from autoprune.envs import PruneEnv
from autoprune.errors import FileError
from autoprune.evaluation import sensitivity
from autoprune.evaluation.dense import dense_model
from autoprune.evaluation.measurement import CachedEvaluate
from autoprune.files import read_json, write_json, write_tensors
from autoprune.identity.claim import Claim
from autoprune.latency.record import MeasurementRecord
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Latency
from autoprune.model.channel_gates import Gating, gate_channels_
from autoprune.model.recurrent.modules import cut_states_
from autoprune.patterns import PATTERNS
from autoprune.pipeline.application import MADE_FOR, load_model
from autoprune.pipeline.outcomes import Outcome, OutcomeLog
from autoprune.plan import Plan
from autoprune.progress import SILENT
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, load, repack, save
from autoprune.repack.tuning.tuning import TuningCache
from autoprune.report.data import ResultRow
from autoprune.report.stored import Results, read_stored, write_stored
from autoprune.report.table import result_table
from autoprune.settings import TrainingSettings
from autoprune.tasks import Task
from autoprune.testing import fake_problem
from autoprune.training.checkpoint import Checkpoint
from benchmarks.fuzz_mutants import changed_json, changed_lines, changed_tensors, changed_toml

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
CONFIGS = Path(__file__).parent.parent / "configs"
Read = Callable[[Path], Any]
LARGE = 2**22  # elements of example inputs that the caller would rather not make


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: as the table says it.
        file: what is mutated, in a folder that `make` has filled.
        make: fills a folder with a sample.
        read: gives what the product reads, as something comparable, and uses it.
        change: changes what the file says.
        by_hand: may be edited, so that no damage to its meaning can be told from an edit.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    read: Read
    change: Callable[..., None]
    by_hand: bool = False


# Packed files --------------------------------------------------------------------------------------------------------


def maps() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.AvgPool2d(3, 1, 1), nn.PixelShuffle(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(8),
        nn.Linear(8, 5),
    )  # fmt: skip


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> Any:
        x = x.reshape(x.shape[0], -1, 12)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 8)
        return {"y": self.out(y) + x, "more": [x * 0.5, (1, x.softmax(-1))]}


class States(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 5)
        cut_states_(self.gru, keep=0.5)

    def forward(self, x: torch.Tensor) -> Any:
        y, (h, c) = self.lstm(x.reshape(x.shape[0], -1, 12))
        return self.head(self.gru(y, h[:1])[0]), c


def gated() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3))
    gate_channels_(model, X, ["2", "3"], Gating(4))
    return model


BUILDS: Mapping[str, Callable[[], nn.Module]] = {"maps": maps, "tokens": Tokens, "states": States, "gated": gated}


def _make_packed(build: str, folder: Path, value_bits: int = 32, form: Any = "program") -> None:
    torch.manual_seed(0)
    model, pattern = BUILDS[build]().eval(), PATTERNS.create(Choice("group", {"size": 4}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 4) and len(parameter) % 4 == 0 and "gate" not in name:
                parameter.mul_(pattern.mask(parameter.abs(), 0.6))
    choose = {"choose": lambda *_: "jit", "form": form} if form == "modules" else {"form": form, "threads": 1}
    save(repack(model, X, **choose), folder / "fast.safetensors", value_bits=value_bits)


def _read_packed(folder: Path, build: str | None = None) -> Any:
    fast = load(folder / "fast.safetensors", None if build is None else BUILDS[build]())
    inputs: tuple[torch.Tensor, ...] = (X,)
    if isinstance(fast, ProgramModel):
        given = fast.program.graph.inputs
        if any(torch.Size(each.shape).numel() > LARGE for each in given):
            return "inputs too large to be made"
        inputs = tuple(torch.ones(each.shape).to(getattr(torch, each.dtype)) for each in given)
    with torch.inference_mode():
        outputs = tree_leaves(fast(*inputs))
    return [_digest(each) if isinstance(each, torch.Tensor) else str(each) for each in outputs]


def _digest(value: torch.Tensor) -> Any:
    """Tells a value from every other; a mutant may give a large one, whose text would take longer than the value."""
    content = value.contiguous().flatten().view(torch.uint8).numpy().data
    return tuple(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()


def packed(name: str, build: str, value_bits: int = 32) -> Kind:
    make = functools.partial(_make_packed, build, value_bits=value_bits)
    return Kind(name, "fast.safetensors", make, _read_packed, changed_tensors)


# Models and agents ---------------------------------------------------------------------------------------------------


def _tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def _state(model: nn.Module) -> Any:
    with torch.inference_mode():
        return model(X).tolist(), {name: value.tolist() for name, value in model.state_dict().items()}


def _read_masked(folder: Path) -> Any:
    model = load_model(folder / "masked.safetensors", _tiny(), "it", SILENT)
    if model is None:
        raise FileError("it is of another run, and made anew")
    return _state(model)


def _dense(folder: Path) -> nn.Module:
    os.environ["AUTOPRUNE_CACHE"] = str(folder)
    data = [(X, torch.tensor([0, 1]))]
    task = Task("tiny", _tiny(), data, tuple(data), data, data, nn.functional.cross_entropy, None)
    return dense_model(task, Choice("tiny"), TrainingSettings(epochs=1), 0, SILENT)


def _make_dense(folder: Path) -> None:
    _dense(folder)
    (path,) = folder.glob("dense-*.safetensors")
    (folder / "name").write_text(path.name)
    path.rename(folder / "dense.safetensors")


def _read_dense(folder: Path) -> Any:
    path = folder / (folder / "name").read_text()
    path.unlink(missing_ok=True)
    path.hardlink_to(folder / "dense.safetensors")
    return _state(_dense(folder))


def _checkpoint(folder: Path) -> Checkpoint:
    model = _tiny()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    return Checkpoint(folder, {"seed": 0, "settings": {"epochs": 3}}, model, optimizer, None)


def _read_training(folder: Path) -> Any:
    checkpoint = _checkpoint(folder)
    losses = checkpoint.load_()
    state = checkpoint.optimizer.state_dict()["state"]
    checkpoint.optimizer.step()
    return losses, {key: str(value) for key, value in state.items()}, _state(checkpoint.model.eval())


def _agent() -> SB3Agent:
    return cast("SB3Agent", AGENTS.create(Choice("ppo", {"net": [8]})))


@functools.cache
def _blank() -> Any:
    return _agent().build(PruneEnv(fake_problem()), 0)


def _make_search(folder: Path) -> None:
    env, agent = PruneEnv(fake_problem()), _agent()
    found = search(agent, env, 6, 0, directory=folder)
    agent.save_policy(folder / "policy", env)
    found.plan.save(folder / "plan.json")
    problem = fake_problem()
    cached = CachedEvaluate(problem.evaluate, folder / "evaluations.jsonl")
    for trial in found.trials:
        cached(trial.plan)


def _read_agent(folder: Path) -> Any:
    model = _blank()
    load_checkpoint_(folder, model)
    state = {name: value.tolist() for name, value in model.policy.state_dict().items()}
    return checkpoint_episodes(folder), model.num_timesteps, state, str(model.policy.optimizer.state_dict())


def _read_policy(folder: Path) -> Any:
    policy = Policy.load(folder / "policy")
    length = policy.act._model.observation_space.shape
    assert length is not None
    action = policy.act(torch.zeros(length).numpy(), 0)
    return str(policy.actions), policy.start, policy.curves, action.tolist()


# Documents -----------------------------------------------------------------------------------------------------------


def _read_plan(folder: Path) -> Any:
    plan = Plan.load(folder / "plan.json")
    plan.check_layers(fake_problem().inventory.names)
    for layer in plan.layers.values():
        PATTERNS.create(layer.pattern)
    return plan.to_json()


def _read_table(folder: Path) -> Any:
    problem = fake_problem()
    table = LatencyTable.load(folder / "latency.json", settings={"batch": 1}, machine={})
    if set(table.layers) == set(problem.inventory.names):
        table.predict_ms(Plan({}))
    return table.to_json()


def _about() -> dict[str, Any]:
    return {"version": sensitivity.SENSITIVITY_VERSION, "anchors": list(sensitivity.ANCHORS), "pattern": "p"}


def _make_documents(folder: Path) -> None:
    problem = fake_problem()
    problem.table.save(folder / "latency.json")
    curve = [n / 10 for n in range(len(sensitivity.ANCHORS))]
    write_json(folder / "sensitivity.json", {**_about(), "loss": {"a": curve}, "error": {"a": curve}})
    config = load_config(CONFIGS / "digits.toml")
    write_json(folder / "config.json", config.to_json())
    (folder / "config.toml").write_text((CONFIGS / "digits.toml").read_text())
    took = Latency.from_samples([0.5, 0.75, 1.0], 1)
    names = ("dense", "masked", "repacked")
    rows = tuple(ResultRow(name, 0.5, took, 2.0, 1.0, 1000, 4000) for name in names)
    write_stored(folder / "results.json", Results(rows, {"batch": 1}, {"cpu": "some"}))
    outcomes = [Outcome("t", "ppo", n, 9, 0.5, 0.5, 2.0, 0.1, 3.0) for n in range(4)]
    OutcomeLog(folder / "outcomes.jsonl").append(outcomes)
    record = MeasurementRecord(folder / "measured.jsonl", {"cpu": "some"})
    for layer in "abc":
        record(layer, lambda: {"us": [1.5, 2.25]})
    Claim(folder).write({"the model": {"weight": "a" * 16}, "the config": {"seed": "0"}})
    write_tensors(folder / "masked.safetensors", _tiny().state_dict(), {MADE_FOR: "it"})
    _checkpoint(folder).save([0.5, 0.25])
    _make_tuning(folder)


def _make_tuning(folder: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    os.environ["AUTOPRUNE_CACHE"] = str(folder)
    repack(model, X, form="program", threads=1)


def _read_tuning(folder: Path) -> Any:
    cache = TuningCache(folder / "tuning.json")
    if not cache.found:
        raise FileError("it is started anew")
    return sorted(map(str, cache.found.items())), sorted(cache.by_sample.items())


def _read_record(folder: Path) -> Any:
    return list(MeasurementRecord(folder / "measured.jsonl", {"cpu": "some"})._values.items())


def _read_results(folder: Path) -> Any:
    read = read_stored(Results, folder / "results.json", "the results")
    return result_table(read.rows), str(read)


def _read_identity(folder: Path) -> Any:
    return Claim(folder)._read()


def _document(
    name: str, file: str, read: Callable[[Path], Any], change: Any = changed_json, hand: bool = False
) -> Kind:
    return Kind(name, file, _make_documents, read, change, hand)


def _searched(
    name: str, file: str, read: Callable[[Path], Any], change: Any = changed_json, hand: bool = False
) -> Kind:
    return Kind(name, file, _make_search, read, change, hand)


def _config(folder: Path) -> Any:
    return parse_config(read_json(folder / "config.json", "the config", by_hand=True), "it").to_json()


KINDS = (
    packed("packed program", "maps"),
    packed("packed program, 8 bits", "tokens", 8),
    packed("packed program, recurrent", "states"),
    packed("packed program, gated", "gated"),
    Kind(
        "packed modules", "fast.safetensors", functools.partial(_make_packed, "maps", form="modules"),
        functools.partial(_read_packed, build="maps"), changed_tensors,
    ),
    _document("masked model", "masked.safetensors", _read_masked, changed_tensors),
    Kind("dense model", "dense.safetensors", _make_dense, _read_dense, changed_tensors),
    _document("training checkpoint", "training.safetensors", _read_training, changed_tensors),
    _searched("agent checkpoint", "agent.json", _read_agent),
    _searched("agent checkpoint, tensors", "agent-6.safetensors", _read_agent, changed_tensors),
    _searched("policy", "policy/policy.json", _read_policy),
    _searched("policy, tensors", "policy/policy.safetensors", _read_policy, changed_tensors),
    _searched("plan", "plan.json", _read_plan, hand=True),
    _searched("trials", "trials.jsonl", lambda folder: TrialLog(folder / "trials.jsonl").read(), changed_lines),
    _searched(
        "evaluations", "evaluations.jsonl",
        lambda folder: list(CachedEvaluate(fake_problem().evaluate, folder / "evaluations.jsonl")._known.items()),
        changed_lines,
    ),
    _document("latency table", "latency.json", _read_table),
    _document("measurements", "measured.jsonl", _read_record, changed_lines),
    _document(
        "sensitivity", "sensitivity.json",
        lambda folder: sensitivity._read(folder / "sensitivity.json", _about(), ["a"]),
    ),
    _document("config of a run", "config.json", _config, hand=True),
    _document("config", "config.toml", lambda path: load_config(path / "config.toml").to_json(), changed_toml, True),
    _document("results", "results.json", _read_results),
    _document("outcomes", "outcomes.jsonl", lambda folder: OutcomeLog(folder / "outcomes.jsonl").read(), changed_lines),
    _document("identity", "identity.json", _read_identity),
    _document("tuning cache", "tuning.json", _read_tuning),
)  # fmt: skip
