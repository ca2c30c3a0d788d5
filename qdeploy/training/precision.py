"""Mixed precision: matrix products in bfloat16 where the device has instructions for it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import nn

from qdeploy.machine import BF16, processor_flags


@cache
def fast_type(device: str) -> torch.dtype | None:
    """What matrix products on such a device are faster in than in float32; None if in nothing.

    float16 is not taken: its range is small, so that gradients would have to be scaled.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if processor_flags() & BF16 else None


def fast(device: str = "cpu") -> torch.autocast:
    """A context in which matrix products are in that type; sums and weights stay in float32."""
    found = fast_type(device)
    return torch.autocast(device, found or torch.bfloat16, enabled=found is not None)


def arithmetic(model: nn.Module) -> torch.autocast | nullcontext[None]:
    """The same for a call of `model`, except that TorchScript keeps its own types."""
    if isinstance(model, torch.jit.ScriptModule):
        return nullcontext()
    return fast(next(model.parameters()).device.type)
