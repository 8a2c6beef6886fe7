"""The dense weight of a packed layer, for code that reads it instead of calling the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class DenseWeight(Tensor):
    """Has the weight's shape, type and device; its values are rebuilt by whatever computes with them.

    Models ask a layer's weight for its type at every call, which must not cost more than the layer.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _rebuilt: Callable[[], Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], rebuilt: Callable[[], Tensor]) -> DenseWeight:
        """A float32 weight of `shape`, whose values `rebuilt` gives."""
        make: Any = Tensor._make_wrapper_subclass
        made: DenseWeight = make(DenseWeight, shape, dtype=torch.float32, device="cpu")
        made._rebuilt = rebuilt
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, given = pytree.tree_map_only(cls, lambda x: x._rebuilt(), (args, dict(kwargs or {})))
        return func(*args, **given)

    def numpy(self, *, force: bool = False) -> Any:
        """As of any tensor."""
        return self._rebuilt().numpy(force=force)

    def tolist(self) -> Any:
        """Likewise."""
        return self._rebuilt().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._rebuilt())
