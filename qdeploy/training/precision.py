"""Arithmetic in bfloat16 where the processor has instructions for it."""

from __future__ import annotations

from functools import cache

import torch

from qdeploy.doctor import BF16, processor_flags


def fast() -> torch.autocast:
    """A context in which matrix products are in bfloat16 if that is fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16())


@cache
def _has_bfloat16() -> bool:
    return bool(processor_flags() & BF16)
