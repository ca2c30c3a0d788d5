"""Arithmetic in bfloat16 where the processor has instructions for it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import nn

from qdeploy.doctor import BF16, processor_flags


def fast() -> torch.autocast:
    """A context in which matrix products are in bfloat16 if that is fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16())


def arithmetic(model: nn.Module) -> torch.autocast | nullcontext[None]:
    """The same for a call of `model`, except that TorchScript keeps its own types."""
    return nullcontext() if isinstance(model, torch.jit.ScriptModule) else fast()


@cache
def _has_bfloat16() -> bool:
    return bool(processor_flags() & BF16)
