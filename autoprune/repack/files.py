"""The packed file: one safetensors file, its description as JSON in the metadata; smaller as sparsity grows.

Packed layers are stored by their packed weight, everything else as in a state dict. A file is data: loading one runs
no code of the file's, and every index is checked before native code sees it.

A program's file holds its graph too, so it needs neither the model's class nor its code. The file of a model in the
``modules`` form holds its weights alone and goes with the original architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError, first_line
from autoprune.files import given_path, read_tensors, write_tensors
from autoprune.model.copies import copy_for_inference, uncompiled_
from autoprune.model.recurrent.names import cell_of, layers_of
from autoprune.repack.graph import schema
from autoprune.repack.graph.aten import FAILURES
from autoprune.repack.graph.batching import apart
from autoprune.repack.graph.calls import Signature
from autoprune.repack.graph.demand import check_demand
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.kernels.compiler import unavailable
from autoprune.repack.lowering.bf16_rules import lacking
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.modules.backends import BACKENDS, LayerForm
from autoprune.repack.modules.replacement import with_submodule
from autoprune.repack.modules.sequences import PackedRecurrent
from autoprune.repack.report import DENSE, LayerReport, ProgramModel, RepackedModel, SwappedModel
from autoprune.repack.runtime.program import Program, check_threads
from autoprune.repack.tuning.tuning import tiling_from_json
from autoprune.repack.weights.packed import PackedWeight
from autoprune.repack.weights.serialized import flag, restore, store

FILE_VERSION = 7
_PROGRAM, _MODULES = "program", "modules"


def save(model: RepackedModel, path: Path | str, *, value_bits: int = 32) -> None:
    """Writes a repacked model; `load` reads it.

    Args:
        model: what `repack` or `load` returned.
        path: of the file.
        value_bits: of a packed layer's weight: 32 as they are, or 8 for a file about a quarter the size whose weights
            are rounded, one scale a group of filters; they are float32 again once loaded. Biases stay as they are.

    Raises:
        AutopruneError: `model` is no repacked model, or there are no values of so many bits.
    """
    tensors: dict[str, Tensor] = {}
    if isinstance(model, ProgramModel):
        about = _describe_program(model.program, value_bits, tensors) | {"parameters": model.signature.to_json()}
    elif isinstance(model, SwappedModel):
        about = _describe_modules(model, value_bits, tensors)
    else:
        raise AutopruneError(f"save takes a model that repack returned, not {type(model).__name__}.")
    about |= {
        "version": FILE_VERSION,
        "report": [asdict(row) for row in model.report],
    }
    write_tensors(given_path(path), tensors, about)


def load(path: Path | str, model: nn.Module | None = None, *, threads: int | None = None) -> RepackedModel:
    """Reads a repacked model.

    Args:
        path: a file of `save`.
        model: for a file of the ``modules`` form, the original architecture, freshly built: its weights do not matter
            and it is left as it is. A program needs none.
        threads: of one inference of a program; as many as torch uses at the call when None.

    Raises:
        FileError: the file is missing, corrupt, of another version, of another model, or needs `model`.
        AutopruneError: `threads` is no number of threads, or layers are in bf16 and this machine has no instruction
            for that.
    """
    check_threads(threads)
    path = given_path(path)
    made: RepackedModel | None = None
    tensors, about = read_tensors(path, "the packed model")
    try:
        if about["version"] != FILE_VERSION:
            raise FileError(f"this release reads version {FILE_VERSION}, not {about['version']!r}")
        report = [_report_row(row) for row in about["report"]]
        if about["form"] == _PROGRAM:
            program = _read_program(tensors, about, threads, path.stat().st_size)
            names = [each.name for each in program.graph.inputs]
            made = ProgramModel(program, report, Signature.from_json(about["parameters"], names))
        elif about["form"] != _MODULES:
            raise FileError(f"its form is {about['form']!r}")
        elif model is not None:
            made = _read_modules(tensors, about, uncompiled_(copy_for_inference(model)), report)
    except FileError as error:
        raise FileError(f"the packed model is corrupt: {path} ({error})") from None
    except (OSError, AssertionError) as error:
        # To tell the shapes of what a graph computes torch loads its compiler, the second time what is loaded by half.
        raise FileError(
            f"the packed model {path} cannot be checked here, since torch's compiler does not load: {error}. If it "
            "wants a folder for temporary files, set TMPDIR to one."
        ) from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, RecursionError,
            AutopruneError) as error:  # fmt: skip
        raise FileError(
            f"the packed model {path} is corrupt, or was made of another model ({type(error).__name__}: "
            f"{first_line(error)}). Repack again, or give the model it was made of."
        ) from None
    if made is None:
        raise FileError(f"{path} holds weights alone: give load the model they belong to, as load(path, model).")
    if isinstance(made, ProgramModel) and not unavailable():
        _check_instructions(made.program)
    return made


def _check_instructions(program: Program) -> None:
    """Raises AutopruneError where this machine lacks an instruction that a program's kernels need."""
    reason = lacking(program.target)
    if reason and any(weights.packed.in_bf16 for weights in program.weights.values()):
        raise AutopruneError(f"{reason} The file is of another machine: repack the model here.")


_ROW = {
    "name": str, "kind": str, "sparsity": float, "group_size": int, "backend": str, "fused": str, "why": str,
    "precision": str,
}  # fmt: skip


def _report_row(row: Any) -> LayerReport:
    for name, kind in _ROW.items():
        if not isinstance(row[name], kind):
            raise FileError(f"the report's {name} is {row[name]!r}")
    for name in ("dense_us", "packed_us", "scale", "snr_db"):
        if not (row[name] is None or isinstance(row[name], float)):
            raise FileError(f"the report's {name} is {row[name]!r}")
    if not (row["zero_point"] is None or type(row["zero_point"]) is int):
        raise FileError(f"the report's zero_point is {row['zero_point']!r}")
    made = LayerReport(**row)
    slow = unavailable() if made.backend == "jit" else None
    return replace(made, why=f"run by torch's own operators, slower: {slow}") if slow else made


# Packed weights ------------------------------------------------------------------------------------------------------


def _put(packed: PackedWeight, key: str, value_bits: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    stored = store(packed, value_bits)
    tensors.update({f"{key}|{part}": tensor for part, tensor in stored.tensors.items()})
    return dict(stored.about)


def _get(key: str, about: Any, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """One packed weight, validated."""
    start = f"{key}|"
    return restore(about, {name.removeprefix(start): part for name, part in tensors.items() if name.startswith(start)})


# Programs ------------------------------------------------------------------------------------------------------------


def _describe_program(program: Program, value_bits: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    packs = {name: weights.packed for name, weights in program.weights.items()}
    layers = {name: _put(packed, f"layer|{name}", value_bits, tensors) for name, packed in packs.items()}
    packed = program.graph.packed_weights(layers)
    for name, tensor in program.graph.constants.items():
        if name not in packed:
            tensors[f"constant|{name}"] = tensor
    tilings = {name: asdict(tiling) for name, tiling in program.tilings.items()}
    return {
        "form": _PROGRAM, "graph": schema.to_json(program.graph), "layers": layers, "tilings": tilings,
        "by_sample": program.by_sample,
    }  # fmt: skip


def _read_program(tensors: Mapping[str, Tensor], about: Any, threads: int | None, held: int) -> Program:
    constants = {key.partition("|")[2]: value for key, value in tensors.items() if key.startswith("constant|")}
    packed = {name: _get(f"layer|{name}", layer, tensors) for name, layer in about["layers"].items()}
    for row in about["graph"]["ops"]:
        if row["output"] in packed:
            shape = packed[row["output"]].shape
            constants.setdefault(row["tensors"]["weight"], torch.empty(shape, dtype=torch.float32, device="meta"))
    graph = schema.from_json(about["graph"], constants)
    weights = {}
    for op in graph.ops:
        if op.output in packed:
            shape = constants[op.tensors["weight"]].shape
            if not isinstance(op, LayerOp) or (shape, op.conv_groups) != _described(packed[op.output]):
                raise FileError(f"{op.output!r} is not the layer that was packed")
            if ("scale" in op.tensors) != (packed[op.output].scale is not None):
                raise FileError(f"{op.output!r} and its packed weight are not of one precision")
            if op.in_bf16 != packed[op.output].in_bf16:
                raise FileError(f"of {op.output!r} and its packed weight one is in bf16 and one is not")
            bias = constants[op.tensors["bias"]] if "bias" in op.tensors else None
            weights[op.output] = Weights.of(packed[op.output], bias)
        elif isinstance(op, LayerOp) and op.in_bf16:
            raise FileError(f"{op.output!r} is in bf16 and its weight is not packed")
    if set(weights) != set(packed):
        raise FileError("it packs layers that the graph does not have")
    missing = {name for name, tensor in constants.items() if tensor.is_meta} - graph.packed_weights(packed)
    if missing:
        raise FileError(f"it reads {sorted(missing)[0]!r}, which it stores packed alone")
    tilings = {name: tiling_from_json(row) for name, row in about["tilings"].items() if name in weights}
    try:
        check_demand(graph, {name: layer.packed.values.size for name, layer in weights.items()}, held)
        by_sample = flag(about["by_sample"]) and apart(graph)
    except FAILURES as error:
        raise FileError(f"its graph has operations that do not fit each other: {error}") from error
    return Program(graph, weights, tilings, threads, by_sample=by_sample)


def _described(packed: PackedWeight) -> tuple[tuple[int, ...], int]:
    return packed.shape, packed.conv_groups


# Modules -------------------------------------------------------------------------------------------------------------


def _describe_modules(model: SwappedModel, value_bits: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name, relu in model.relus.items():
        module: Any = model.model.get_submodule(name)
        if isinstance(module, PackedRecurrent):
            layers[name] = _put_recurrent(module, name, value_bits, tensors)
            continue
        layers[name] = {**_put(module.packed, name, value_bits, tensors), "relu": relu}
        if module.bias is not None:
            tensors[f"{name}|bias"] = module.bias
    for name, module in model.model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and "value=<Tensor>" in str(module.inlined_graph):
            raise AutopruneError(
                f"weights of {name!r} are frozen into TorchScript and in no state dict, and cannot be saved: put the "
                "module that it was made of in its place, and repack."
            )
    inside = tuple(f"{name}." if name else "" for name in layers)
    for key, value in model.model.state_dict().items():
        if not (inside and key.startswith(inside)):
            if not isinstance(value, Tensor):
                raise AutopruneError(
                    f"the model's state dict holds a {type(value).__name__} as {key!r}, a packed file only tensors: "
                    "parts that torch has quantised cannot be saved, repack the model in float32."
                )
            tensors[key] = value
    return {"form": _MODULES, "layers": layers, "removed": list(model.removed)}


def _read_modules(tensors: dict[str, Tensor], about: Any, model: nn.Module, report: list[LayerReport]) -> SwappedModel:
    chosen = {row.name: row.backend for row in report}
    for name in about["removed"]:
        if not isinstance(model.get_submodule(name), (nn.BatchNorm2d, nn.ReLU)):
            raise FileError(f"{name!r} is no batch norm or ReLU in this model")
        model = with_submodule(model, name, nn.Identity())
    relus: dict[str, bool] = {}
    for name, layer in about["layers"].items():
        recurrent = "weights" in layer
        relus[name] = not recurrent and flag(layer["relu"])
        read = _recurrent if recurrent else _lowered
        lowered = read(name, layer, tensors, model, chosen[name])
        model = with_submodule(model, name, lowered)
    rest = {key: value for key, value in tensors.items() if "|" not in key}
    _load_rest(model, rest, tuple(f"{name}." if name else "" for name in relus))
    return SwappedModel(model, report, relus, about["removed"])


def _lowered(name: str, layer: Any, tensors: dict[str, Tensor], model: nn.Module, backend: str) -> nn.Module:
    """Rebuilds one packed layer: arrays validated, shapes compared with the model's own layer."""
    module = model.get_submodule(name)
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or backend == DENSE:
        raise FileError(f"{name!r} is no layer that can be packed in this model")
    packed = _get(name, layer, tensors)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    if packed.shape != tuple(module.weight.shape) or packed.conv_groups != groups:
        raise FileError(f"{name} has shape {packed.shape}, the model's has {tuple(module.weight.shape)}")
    bias = tensors.get(f"{name}|bias")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != packed.shape[:1]):
        raise FileError(f"the bias of {name} has shape {tuple(bias.shape)}")
    module.weight = nn.Parameter(packed.unpack(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    form = LayerForm(module, flag(layer["relu"]))
    support = BACKENDS.get(backend)().supports(form)
    if not support.ok and support.why != unavailable():  # for want of kernels it runs by torch
        raise AutopruneError(f"{name} was packed for backend {backend!r}, which cannot run here: {support.why}")
    return BACKENDS.get(backend)().lower(form)


def _put_recurrent(module: PackedRecurrent, name: str, value_bits: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for role, bias in module.biases.items():
        tensors[f"{name}.{role}|bias"] = bias
    packs = module.packs.items()
    return {"weights": {weight: _put(packed, f"{name}.{weight}", value_bits, tensors) for weight, packed in packs}}


def _recurrent(name: str, layer: Any, tensors: dict[str, Tensor], model: nn.Module, backend: str) -> nn.Module:
    """Rebuilds one packed LSTM or GRU: arrays validated, shapes compared with the model's own."""
    module = model.get_submodule(name)
    cell = cell_of(module)
    if not isinstance(module, (nn.LSTM, nn.GRU)) or cell is None or backend == DENSE:
        raise FileError(f"{name!r} is no LSTM or GRU in this model")
    packs = {weight: _get(f"{name}.{weight}", about, tensors) for weight, about in layer["weights"].items()}
    shapes = {weight: tuple(linear.weight.shape) for weight, linear in layers_of(module).items()}
    if {weight: packed.shape for weight, packed in packs.items()} != shapes:
        raise FileError(f"{name} has weights of other shapes than the model's {shapes}")
    biases = {}
    for role, parameter in module.named_parameters():
        if role.startswith("bias"):
            biases[role] = tensors[f"{name}.{role}|bias"]
            if biases[role].dtype != torch.float32 or biases[role].shape != parameter.shape:
                raise FileError(f"the bias {name}.{role} has shape {tuple(biases[role].shape)}")
    form = LayerForm(module)
    support = BACKENDS.get(backend)().supports(form)
    if not support.ok and support.why != unavailable():  # for want of kernels it runs by torch
        raise AutopruneError(f"{name} was packed for backend {backend!r}, which cannot run here: {support.why}")
    return PackedRecurrent(module, packs, biases)


def _load_rest(model: nn.Module, rest: dict[str, Tensor], packed: tuple[str, ...]) -> None:
    for name, module in model.named_modules():  # a folded batch norm gives a convolution a bias
        if isinstance(module, nn.Conv2d) and module.bias is None and f"{name}.bias" in rest:
            module.bias = nn.Parameter(torch.zeros(module.out_channels), requires_grad=False)
    expected = {key for key in model.state_dict() if not (packed and key.startswith(packed))}
    if expected != set(rest):
        raise FileError(f"it has other parameters than the model: {sorted(expected ^ set(rest))[:3]}")
    for key, value in model.state_dict().items():
        if key in rest and (rest[key].shape != value.shape or rest[key].dtype != value.dtype):
            raise FileError(f"{key} has shape {tuple(rest[key].shape)}, the model's has {tuple(value.shape)}")
    model.load_state_dict(rest, strict=False)
