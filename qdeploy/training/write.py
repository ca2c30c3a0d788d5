"""Torch networks on disk."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from qdeploy.disk.files import write_atomically


def write_state(path: Path, model: nn.Module) -> None:
    """Write the state dict of `model`.

    Raises:
        OutputError: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in model.state_dict().items()}, buffer)
    write_atomically(path, buffer.getvalue())


def write_script(path: Path, model: torch.jit.ScriptModule) -> None:
    """Write a TorchScript module.

    Raises:
        OutputError: it cannot be written.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # torch advises its users against TorchScript
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(model, buffer)
    write_atomically(path, buffer.getvalue())
