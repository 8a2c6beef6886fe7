"""A run: one config, one directory, and the stages from a task to a fast model.

Every stage writes its result before the next one starts and loads it when it is there already, so a stopped run
goes on where it was, and every verb of the command line is "run the stages up to this one".
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.agents.baseline import CLOSE, reward_at, uniform_at
from autoprune.config import parse_config
from autoprune.envs import PruneEnv
from autoprune.envs.projection import check_movable, meet
from autoprune.errors import ConfigError, FileError, InfeasibleTarget
from autoprune.evaluation.dense import other_dense_models
from autoprune.evaluation.measurement import CachedEvaluate, Failure, Measurement
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.evaluation.recovery.none import NoRecovery
from autoprune.evaluation.sensitivity import ANCHORS, Sensitivity
from autoprune.files import read_json, read_tensors, write_json, write_tensors
from autoprune.identity.fingerprint import digest
from autoprune.latency.timer import speedup, torch_threads
from autoprune.pipeline.search import Search
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice
from autoprune.repack import RepackedModel, load, repack, save
from autoprune.report.tensorboard import TrialWriter
from autoprune.tasks.user import functions_of
from autoprune.training import TRAINING

_MADE_FOR = "made_for"
_OUTCOMES = (
    "masked.safetensors",
    "repacked.safetensors",
    "results.json",
    "report.json",
    "report.md",
)  # each of the last


class Run(Search):
    """All stages, from the task to the repacked model. Each does its work, and that of those before it, once."""

    @cached_property
    def plan(self) -> Plan:
        """The plan to apply: the directory's, or the best one found."""
        path = self.directory / "plan.json"
        if path.exists():
            plan = Plan.load(path)
            plan.check_layers(self.inventory.names)
            return plan
        plan = self.found.plan
        plan.save(path)
        best = self.found.best
        measured = best.measurement
        self.progress.say(
            f"best plan: {self.task.metric.said(measured.score)}, {measured.speedup:.2f}x, reward {best.reward:.3f}"
        )
        return plan

    def decide(self) -> None:
        """Takes a plan without a search: every layer alike, at the target's sparsity, or as fast as it asks.

        The speed-up is measured, and aimed at again where the latency table was wrong. The methods that find the
        layers' shares spend the cost of this plan.

        Raises:
            ConfigError: the target is an accuracy drop, or a speed-up of a pattern that allows one sparsity alone.
            InfeasibleTarget: no uniform plan is that fast; the message has the best reachable figure.
        """
        target, env = self.config.target, self.config.env
        if (self.directory / "plan.json").exists():
            return
        if target.accuracy_drop is not None:
            raise ConfigError("pruning without a search needs --sparsity or --speedup (or a target that is one).")
        layer = LayerPlan(target.sparsity or 0.0, env.pattern, env.criterion)
        plan = Plan(dict.fromkeys(self.inventory.names, layer), self.config.finetune.method)
        if target.speedup is not None:
            check_movable(env.pattern)  # before the table, which takes a while
            none = dict.fromkeys(self.offered.names, (0.0,) * len(ANCHORS))
            unknown = Sensitivity(ANCHORS, none, none)
            untrained = replace(self.evaluator, recovery=NoRecovery())
            env_ = PruneEnv(self._problem(unknown, CachedEvaluate(untrained)), (Choice("sparsity"),))
            found = uniform_at(env_, target.speedup)
            if found is None:
                raise InfeasibleTarget(
                    f"no uniform plan was measured to be {target.speedup:g}x faster, though the latency table predicts "
                    f"{env_.reachable_speedup():.2f}x at best. Ask for less, allow a higher sparsity "
                    "(env.max_sparsity), or let more layers be pruned."
                )
            plan = found.plan
        plan.save(self.directory / "plan.json")

    def aim_again(self) -> None:
        """Trains once more, to a plan that is as much faster as the trained, repacked model fell short of the target.

        Once a run, and only after a miss: methods that find the layers' shares spend the plan's milliseconds by the
        latency table, which the clock may not agree with.
        """
        wanted, path = self.config.target.speedup, self.directory / "aim.json"
        if wanted is None or path.exists():
            return
        evaluator = replace(self.evaluator, protocol=self._protocol(self.config.latency.samples))
        measured = speedup(*evaluator.time(self.repacked))
        if measured >= wanted * (1 - CLOSE):
            return
        aim = self.table.predict_speedup(self.plan) * wanted / measured
        plan = meet(self.plan, self.table, aim, self.config.env.max_sparsity)
        self.progress.say(f"measured {measured:.2f}x of {wanted:g}x: once more, with {aim:.2f}x in the latency table")
        if plan != self.plan:
            for name in ("repacked", "masked"):
                self.__dict__.pop(name, None)
            plan.save(self.directory / "plan.json")
            self.plan = plan
        write_json(path, {"measured": measured, "aim": aim})

    def adopt(self, path: Path) -> None:
        """Takes the plan of a file in place of a searched one; refused when the run has another already."""
        plan = Plan.load(path)
        plan.check_layers(self.inventory.names)
        own = self.directory / "plan.json"
        if own.exists() and Plan.load(own) != plan:
            raise ConfigError(
                f"{self.directory} has a plan already, and it differs from {path}. Use another --run-dir."
            )
        plan.save(own)

    @cached_property
    def uniform(self) -> dict[str, Any]:
        """The best plan as ``agent`` and the ``uniform`` rule at its measured speed-up (None: not that fast).

        Both are measured anew, in the same way: the best of many trials was also the luckiest with the clock.
        """
        path, plan = self.directory / "uniform.json", self.found.plan
        if not path.exists() or read_json(path, "the comparison with uniform")["agent"]["plan"] != plan.to_json():
            problem = replace(self.problem, evaluate=self.measured)
            env = self.env.of(problem)
            again = problem.evaluate(plan)
            if isinstance(again, Failure):
                self.progress.say(f"the best plan failed when it was measured again ({again.reason}): as in the search")
            measured = again if isinstance(again, Measurement) else self.found.best.measurement
            baseline = uniform_at(env, measured.speedup)
            agent = {**measured.to_json(), "reward": reward_at(env, measured, measured.speedup)}
            uniform = baseline.to_json() if baseline else None
            write_json(path, {"agent": {"plan": plan.to_json(), **agent}, "uniform": uniform})
        data: dict[str, Any] = read_json(path, "the comparison with uniform")
        return data

    @cached_property
    def pruned(self) -> nn.Module:
        """The dense model under the plan's masks, recovered as in the search, not fine-tuned."""
        path = self.directory / "pruned.safetensors"
        if (model := self._load(path, trained=self.evaluator.recovery.trains)) is None:
            model = self.evaluator.masked_model(self.plan)
            write_tensors(path, model.state_dict(), {_MADE_FOR: self._made_for})
        return model

    @cached_property
    def masked(self) -> nn.Module:
        """The masked model, fine-tuned by the plan's method."""
        path = self.directory / "masked.safetensors"
        if (model := self._load(path, trained=True)) is None:
            model = self._finetuned()
            self._drop_after(path)
            write_tensors(path, model.state_dict(), {_MADE_FOR: self._made_for})
            shutil.rmtree(self.directory / "finetune", ignore_errors=True)
        return model

    @cached_property
    def repacked(self) -> RepackedModel:
        """The fast model, its backends chosen by measurement here."""
        path, masked = self.directory / "repacked.safetensors", self.masked  # of the plan that is there: checked first
        if path.exists():
            return load(path, self._untrained())
        latency = self.config.latency
        with torch_threads(latency.threads):
            model = repack(
                masked,
                self.task.example_inputs(latency.batch),
                protocol=self._protocol(latency.search_samples),
                clock=self.clock,
            )
        value_bits = self.config.repack.value_bits
        self._drop_after(path)
        save(model, path, value_bits=value_bits)
        return model if value_bits == 32 else load(path, self._untrained())

    def _finetuned(self) -> nn.Module:
        model = copy.deepcopy(self.dense)
        with torch_threads(self._work_threads), TrialWriter(self.directory / "tensorboard" / "finetune") as writer:
            finetune_(
                model,
                self.plan,
                self.evaluator.subject if self.subject.budget == "latency" else self.subject,  # the table takes a while
                self.config.finetune.settings,
                teachers=self._other_teachers(),
                checkpoint=self.directory / "finetune",
                progress=self.progress,
                title="fine-tuning",
                on_signals=lambda step, signals: writer.training(step, signals.scalars, signals.histograms),
            )
        return model.eval()

    def _other_teachers(self) -> list[nn.Module]:
        """The dense models of other seeds that fine-tuning distils from, beside the run's own."""
        config = self.config
        settings = config.finetune.settings.changed(self.plan.settings)
        if config.finetune.teachers == 1 or settings.distillation_weight == 0:
            return []
        return other_dense_models(config.task, config.dense, config.seed, config.finetune.teachers - 1, self.progress)

    def _untrained(self) -> nn.Module:
        """The architecture that fine-tuning gives: the task's, or wider where the plan's method widens it."""
        model = copy.deepcopy(self.task.model)
        inputs = self.task.example_inputs(self.config.latency.batch)
        TRAINING.create(self.plan.training).widen_(model, inputs, self.plan)
        return model

    @property
    def complete(self) -> bool:
        """Whether the report is there, and of the plan that is there."""
        report, masked = self.directory / "report.md", self.directory / "masked.safetensors"
        if not (report.exists() and masked.exists() and (self.directory / "plan.json").exists()):
            return False
        return read_tensors(masked, "the saved model")[1].get(_MADE_FOR) == self._made_for

    @property
    def _made_for(self) -> str:
        """What tells a model of this run and its plan from any other: written into its file."""
        plan = self.plan  # whoever has one has claimed the directory
        return digest(self._claim.key, plan.key)

    def _drop_after(self, path: Path) -> None:
        """Takes away what was made from the file that is about to be made anew."""
        for name in _OUTCOMES[_OUTCOMES.index(path.name) + 1 :]:
            (self.directory / name).unlink(missing_ok=True)

    def _load(self, path: Path, *, trained: bool) -> nn.Module | None:
        """The model of a file, None when there is none of this plan; `trained`: the plan's method trained it."""
        if not path.exists():
            return None
        tensors, about = read_tensors(path, "the saved model")
        if about.get(_MADE_FOR) != self._made_for:
            self.progress.say(f"{path} is of another plan or run: it is made anew")
            return None
        model = self._untrained() if trained else copy.deepcopy(self.task.model)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise FileError(
                f"the saved model {path} does not fit the task ({error}). Delete it to redo its stage."
            ) from None
        return model.eval()


def run_in(directory: Path, *, run_code: bool, progress: Progress = SILENT) -> Run:
    """The run that is kept in a directory, of the config that is kept there.

    Args:
        directory: of a run.
        run_code: whether functions of a user's own that the config names may be imported and called.
        progress: where long work is shown.

    Raises:
        FileError: there is no such run.
        ConfigError: its functions may not be called, or its model is in a program alone.
    """
    path = directory / "config.json"
    config = parse_config(read_json(path, "the run's config", by_hand=True), str(path))
    if config.task.name == "given":
        raise ConfigError(
            f"{directory} was made by autoprune.compress, whose model only your program has: call "
            "autoprune.export_onnx(model, example_inputs, path) there, or load its repacked.safetensors."
        )
    if not run_code and (functions := functions_of(config.task)):
        raise ConfigError(
            f"{path} names functions that this would import and call: {' and '.join(functions)}. Give --run-code if "
            "you trust that directory and what these names stand for here."
        )
    return Run(config, directory, progress=progress, workers=None)
