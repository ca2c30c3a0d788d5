"""A device that is not there: finds tensors left on the CPU, where no accelerator is at hand.

Under `pretending()`, "cuda" names a device whose tensors are computed on the CPU. Mixing them with
tensors of the CPU fails as it does on a real one: scalars and indices may come from the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
INDEXING = ("index.Tensor", "index_put", "_index_put_impl")
COPIES = ("_to_copy", "copy_")


class Elsewhere(Tensor):
    """A tensor of that device, around one of the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, dict(kwargs or {}))


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, dict(kwargs or {}))


@contextmanager
def pretending() -> Iterator[torch.device]:
    """A context in which the device is there."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with patch("torch.cuda._lazy_init"), _Mode():
            yield CUDA
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = str(func).removeprefix("aten.")
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, Elsewhere)]
    asked = kwargs.pop("device", None)
    if not name.startswith(COPIES):
        scanned_digest = tensors[:1] if name.startswith(INDEXING) else tensors
        here = [t for t in scanned_digest if not isinstance(t, Elsewhere) and t.dim() > 0]
        assert not (there and here), f"{func} mixes devices: {[tuple(t.shape) for t in here]}"
    goal = torch.device(asked) if asked is not None else None
    wraps = goal.type == "cuda" if goal is not None else bool(there)
    if name.startswith("new_"):  # autograd's own, which looks at the device underneath
        wraps = bool(there)
    if goal is not None:
        kwargs["device"] = torch.device("cpu")
        if name.startswith(COPIES):
            kwargs.pop("non_blocking", None)
    out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    if name.endswith("_") or name.split(".")[0].endswith("_"):
        return args[0]  # in place: the wrapper stays itself
    return tree_map(lambda value: _dressed(value) if wraps else value, out)


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _dressed(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, Tensor) else value
