"""Which of torch's operators a graph may hold: those that only compute tensors of tensors, and always the same ones.

A name in a file never resolves to anything that writes, reads files, draws random numbers, hands out uninitialised
memory or reinterprets a tensor's storage; nor to what trusts its arguments, so that wrong ones would crash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

_TAGS = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.generated,  # functional forms of what writes, for compilers
}
# Tagged in spite of what they do here: random for the sake of its dropout; of unknown shape where it is given a mask.
_NAMED = {"scaled_dot_product_attention.default", "index.Tensor"}
_GIVEN = re.compile(r"(Optional\[|List\[)*(Tensor|int|float|bool|number|str)\]*")
_UNSAFE = re.compile(
    "empty|as_strided|_backward|resize|set_|_local_scalar|sym_|_fft_|embedding_bag|embedding_renorm|dist_|from_file"
    r"|^view(_copy)?\.dtype|^native_batch_norm|hacked_twin|unsafe|segment|unpool|fractional"
    r"|upsample.*d\.default"  # which believe the scale they are told
)
_ODD = re.compile(  # unless they are core: of no use in a graph, of other tensors than it holds, or too little checked
    r"_jvp|_stats|polynomial|^to\.prim|^to_dense|^cuda|^pin_memory|^lift\.|^lift_fresh\.|^data\.|^tensor\.|^as_tensor"
    r"|^sorted|\.a$|dense_tensors|_copy\.|__interpolate|__upsample|slow_conv|thnn|overrideable|conv_depthwise"
    r"|sparse|_coo|csr|csc|bsr|bsc|^(row_|col_|crow_|ccol_|)indices|^values|coalesce|hspmm|^smm|sspaddmm"
    "|quant|qparams|q_per_|int_repr|fbgemm|mkldnn|cudnn|miopen|nested|jagged|padded_tensor"
    "|complex|polar|chalf|conj|^real|^imag|angle|fft|stft|view_as|matrix_H|^mH|adjoint"
    "|linalg_|lu_|cholesky|ormqr|orgqr|geqrf|svd|^qr|pinverse|nuclear|det|triangular|lstsq|matrix_exp|matrix_power"
    "|loss|entropy|kl_div|histogram|hash_tensor|mvlgamma|multigammaln|polygamma|chain_matmul|frobenius|^cross"
    r"|nonzero|unique|^where\.default|tensor_indices|self_Tensor|^narrow\.Tensor|combinations"  # shapes by values
)
_WHOLE = {  # that torch.export leaves whole
    *("_log_softmax.default", "_softmax.default", "linalg_vector_norm.default", "linalg_cross.default"),
    *("count_nonzero.default", "count_nonzero.dim_IntList"),
}


def is_allowed(operator: object) -> bool:
    """Whether an operator may stand in a graph: of aten, functional, deterministic, from tensors to tensors."""
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace != "aten":
        return False
    name, schema = str(operator).removeprefix("aten."), operator._schema
    if schema.is_mutable or any(argument.is_out for argument in schema.arguments):
        return False
    if name in _NAMED:
        return True
    if not _TAGS.isdisjoint(operator.tags) or not _computes_tensors(schema):
        return False
    if _UNSAFE.search(name):
        return False
    if torch.Tag.core in operator.tags or name in _WHOLE:
        return True
    private = name.startswith("_") and not name.startswith("__")
    return not private and not _ODD.search(name)


def _computes_tensors(schema: Any) -> bool:
    """Whether it returns tensors, and needs nothing but tensors, numbers, texts and element types."""
    results = {str(each.real_type) for each in schema.returns}
    if not results or not results <= {"Tensor", "List[Tensor]"}:
        return False
    return all(argument.has_default_value() or _GIVEN.fullmatch(str(argument.type)) for argument in schema.arguments)


def fault(name: str, given: Mapping[str, Any]) -> str:
    """What is wrong with an operator's arguments by name, in which it would trust; empty where nothing is."""
    check = _CHECKS.get(name.removeprefix("aten."))
    return "" if check is None else check(given)


def _statistics(given: Mapping[str, Any]) -> str:
    """Running statistics are written where they are not used; the schema does not say so."""
    training = given.get("training") or given.get("use_input_stats")
    written = training and given.get("running_mean") is not None
    return "updates running statistics" if written else ""


def _sampling(given: Mapping[str, Any]) -> str:
    """Modes are numbers, which torch does not look at."""
    modes = {key: given.get(key) for key in ("interpolation_mode", "padding_mode")}
    wrong = {key: mode for key, mode in modes.items() if type(mode) is not int or mode not in range(3)}
    return f"samples a grid with {wrong}" if wrong else ""


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "batch_norm.default": _statistics,
    "instance_norm.default": _statistics,
    **dict.fromkeys(("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default"), _sampling),
}
