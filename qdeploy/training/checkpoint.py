"""What a training needs to go on where it was stopped."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qdeploy.disk.files import write_atomically
from qdeploy.disk.state import sealed, unsealed
from qdeploy.formats.torch_files import checkpoint

SECONDS_BETWEEN_SAVES = 60


class Checkpoint:
    """One file, replaced as a whole; tensors and plain containers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = time.monotonic()

    def load(self) -> Any | None:
        """What was saved last; None if nothing was, or not by this user."""
        data = unsealed(self.path, "checkpoint", *self._place())
        return None if data is None else checkpoint(self.path, data)

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._last > SECONDS_BETWEEN_SAVES

    def save(self, state: Mapping[str, Any]) -> None:
        """Put `state` in the place of what was saved before."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = sealed(buffer.getvalue(), "checkpoint", *self._place())
        write_atomically(self.path, kept)
        self._last = time.monotonic()

    def _place(self) -> tuple[str, ...]:
        """The run and the name that it is kept under: it is of no other."""
        return self.path.absolute().parts[-3:]
