"""What is decided (LayerPlan, Plan) about what there is (LayerSpec): frozen data that survives JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from autoprune.errors import ConfigError, FileError, did_you_mean
from autoprune.files import read_json, write_json
from autoprune.precision import OF_LAYERS, ModelPrecision, OfLayer, RunPrecision
from autoprune.registry import Choice

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerSpec:
    """One prunable layer as it was seen to run on the example input.

    Attributes:
        name: fully qualified module name; of a weight that is not its module's ``weight``, its own:
            ``encoder.weight_hh_l0``, ``attention.in_proj_weight``.
        kind: ``conv1d``, ``conv2d``, ``linear``, ``lstm`` or ``gru``.
        weight_shape: ``(out, in)``, or with the kernel's axes behind ``in / conv_groups``, as the operator reads it.
        conv_groups: groups of a grouped convolution; 1 otherwise.
        stride, padding, dilation: of a convolution, a conv1d being a conv2d of height 1.
        input_shape: shape of the layer's input, batch included.
        positions: output positions an inference (batch x height x width, or tokens), over all calls.
        calls: how often the layer runs in one inference.
        gates: rows a unit of a recurrent weight has, those of one gate together; 1 otherwise.
        norm: the affine batch norm that reads this layer's output as it is and nothing else, or None.
        turned: whether the parameter holds `weight_shape` the other way round: ``(in, out)``.
        biases: the parameters, by qualified name, that are added to the product: one entry a filter.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    positions: int
    conv_groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    calls: int = 1
    gates: int = 1
    norm: str | None = None
    turned: bool = False
    biases: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights, bias left out."""
        return math.prod(self.weight_shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one dense inference."""
        return self.weights * self.positions

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LayerPlan:
    """What is decided for one layer.

    Attributes:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: of the mask.
        criterion: scores the weights.
        precision: of the repacked layer, in a run whose precision is ``planned``.
    """

    sparsity: float
    pattern: Choice
    criterion: Choice = field(default_factory=lambda: Choice("magnitude"))
    precision: OfLayer = "float32"

    def __post_init__(self) -> None:
        if not (isinstance(self.sparsity, (int, float)) and 0.0 <= self.sparsity < 1.0):
            raise ConfigError(f"a layer's sparsity must be in [0, 1), not {self.sparsity!r}.")
        if self.precision not in OF_LAYERS:
            raise ConfigError(f"a layer's precision is one of {', '.join(OF_LAYERS)}, not {self.precision!r}.")

    @property
    def curve(self) -> str:
        """The latency curve that it is on, as the latency table calls it."""
        return curve_of(self.pattern, self.precision)

    @property
    def whole(self) -> bool:
        """Whether the layer stays as it is in the dense model."""
        return self.sparsity == 0.0 and self.precision == "float32"

    def to_json(self) -> dict[str, Any]:
        """As plain data; the precision is left out where it is float32."""
        return {
            "sparsity": self.sparsity,
            "pattern": self.pattern.to_json(),
            "criterion": self.criterion.to_json(),
            **({} if self.precision == "float32" else {"precision": self.precision}),
        }

    @classmethod
    def from_json(cls, data: Any, name: str) -> LayerPlan:
        """Raises ConfigError, with the layer's name, that says which part of `data` is no layer's plan."""
        keys = {"sparsity", "pattern", "criterion"}
        if not isinstance(data, dict) or not keys <= set(data) <= {*keys, "precision"}:
            raise ConfigError(
                f"layer {name!r} of the plan must hold 'sparsity', 'pattern' and 'criterion', and may hold 'precision'."
            )
        if isinstance(data["sparsity"], bool) or not isinstance(data["sparsity"], (int, float)):
            raise ConfigError(f"layer {name!r}: a sparsity must be a number, not {data['sparsity']!r}.")
        return cls(
            float(data["sparsity"]), Choice.from_json(data["pattern"]), Choice.from_json(data["criterion"]),
            data.get("precision", "float32"),
        )  # fmt: skip


def curve_of(pattern: Choice, precision: OfLayer = "float32") -> str:
    """What the latency table calls the curve of a pattern and a precision: its key."""
    return str(pattern) if precision == "float32" else f"{pattern} in {precision}"


@dataclass(frozen=True)
class Plan:
    """Per-layer decisions plus the training that applies them: what an agent decides, saved as JSON.

    `settings` overrides the run's training settings by name, e.g. ``{"learning_rate": 0.02}``.
    """

    layers: Mapping[str, LayerPlan]
    training: Choice = field(default_factory=lambda: Choice("one_shot"))
    settings: Mapping[str, float] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def with_layer(self, name: str, layer: LayerPlan) -> Self:
        """Returns a copy in which `name` is decided as `layer`."""
        return replace(self, layers={**self.layers, name: layer})

    def with_sparsities(self, sparsities: Mapping[str, float]) -> Self:
        """Returns a copy with the given layers' sparsities changed."""
        changed = {name: replace(self.layers[name], sparsity=value) for name, value in sparsities.items()}
        return replace(self, layers={**self.layers, **changed})

    def with_precisions(self, precisions: Mapping[str, OfLayer]) -> Self:
        """Returns a copy with the given layers' precisions changed."""
        changed = {name: replace(self.layers[name], precision=value) for name, value in precisions.items()}
        return replace(self, layers={**self.layers, **changed})

    def precision_in(self, run: RunPrecision) -> ModelPrecision:
        """What the plan's model is repacked in, in a run of this precision: the run's, or its layers' own."""
        if run != "planned":
            return run
        in_bytes: dict[str, OfLayer] = {
            name: layer.precision for name, layer in self.layers.items() if layer.precision != "float32"
        }
        return in_bytes or "float32"

    @property
    def key(self) -> str:
        """A digest of all the plan says: equal plans, equal keys."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "training": self.training.to_json(),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises ConfigError that says which part of `data` is not a plan."""
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise ConfigError("a plan must be an object with 'version', 'layers', 'training' and 'settings'.")
        if data.get("version") != PLAN_VERSION:
            raise ConfigError(f"this release reads plans of version {PLAN_VERSION}, not {data.get('version')!r}.")
        if extra := set(data) - {"version", "layers", "training", "settings"}:
            raise ConfigError(f"a plan holds 'version', 'layers', 'training' and 'settings', not {sorted(extra)}.")
        settings = data.get("settings", {})
        if not isinstance(settings, dict) or not all(isinstance(value, (int, float)) for value in settings.values()):
            raise ConfigError(f"a plan's 'settings' must map names to numbers, not {settings!r}.")
        layers = {name: LayerPlan.from_json(layer, name) for name, layer in data["layers"].items()}
        return cls(layers, Choice.from_json(data.get("training")), settings)

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises FileError when the file is missing or not a plan."""
        try:
            return cls.from_json(read_json(path, "the plan", by_hand=True))
        except ConfigError as error:
            raise FileError(f"the plan is corrupt: {path}: {error}") from None

    def check_run(self, names: list[str], run: RunPrecision) -> None:
        """Raises ConfigError when it is no plan of a run of these layers and this precision: int8 would go unheeded."""
        self.check_layers(names)
        in_bytes = [name for name, layer in self.layers.items() if layer.precision != "float32"]
        if in_bytes and run != "planned":
            raise ConfigError(
                f"the plan has layers in int8, such as {in_bytes[0]!r}, and the run's precision is {run!r}. Take "
                "precision 'planned', in which each layer has the precision of its plan."
            )

    def check_layers(self, names: list[str]) -> None:
        """Raises ConfigError when the plan names a layer the model does not have."""
        for name in self.layers:
            if name not in names:
                raise ConfigError(
                    f"the plan names a layer the model does not have: {name!r}. {did_you_mean(name, names)}"
                )
