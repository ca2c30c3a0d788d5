"""What a training needs to go on where it was stopped."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from qdeploy.disk.files import write_atomically
from qdeploy.disk.state import sealed, unsealed
from qdeploy.formats.torch_files import checkpoint

SECONDS_BETWEEN_SAVES = 60


@runtime_checkable
class Stateful(Protocol):
    """What a training changes and torch knows how to keep: a model, an optimizer, a schedule."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


Parts = Mapping[str, Stateful | torch.Generator]


def state_of(parts: Parts, **facts: Any) -> dict[str, Any]:
    """All that the next steps depend on: the state of each part, and facts in plain containers."""
    states = {
        name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        for name, part in parts.items()
    }
    return {"parts": states, "facts": facts}


def restore(saved: Mapping[str, Any], parts: Parts) -> Mapping[str, Any]:
    """Put the parts where `state_of` found them; the facts that were kept with them."""
    for name, part in parts.items():
        state = saved["parts"][name]
        if isinstance(part, torch.Generator):
            part.set_state(state)
        else:
            part.load_state_dict(state)
    facts: Mapping[str, Any] = saved["facts"]
    return facts


class Checkpoint:
    """One file, replaced as a whole; tensors and plain containers only.

    Args:
        digest: Of all that decides about the training, where its place does not tell it.
    """

    def __init__(self, path: Path, digest: str = "") -> None:
        self.path, self._digest = path, digest
        self._last = time.monotonic()

    def load(self) -> Mapping[str, Any] | None:
        """What was saved last; None if nothing was, not by this user, or not by this version."""
        data = unsealed(self.path, "checkpoint", *self._place())
        saved = None if data is None else checkpoint(self.path, data)
        return saved if isinstance(saved, dict) and saved.keys() == {"parts", "facts"} else None

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._last > SECONDS_BETWEEN_SAVES

    def save(self, state: Mapping[str, Any]) -> None:
        """Put `state`, of `state_of`, in the place of what was saved before."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = sealed(buffer.getvalue(), "checkpoint", *self._place())
        write_atomically(self.path, kept)
        self._last = time.monotonic()

    def save_steps(self, parts: Parts, steps: int, seconds: float) -> None:
        """The same of a training that is no more than its steps, and the seconds they took."""
        self.save(state_of(parts, steps=steps, seconds=seconds))

    def steps_done(self, parts: Parts) -> tuple[int, float]:
        """Steps and seconds of what `save_steps` saved, with the parts put where they were."""
        saved = self.load()
        if saved is None:
            return 0, 0.0
        facts = restore(saved, parts)
        return int(facts["steps"]), float(facts["seconds"])

    def _place(self) -> tuple[str, ...]:
        """The run and the name that it is kept under: it is of no other."""
        return (*self.path.absolute().parts[-3:], self._digest)
