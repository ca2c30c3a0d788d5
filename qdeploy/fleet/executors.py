"""What runs cells: a protocol, and a row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from qdeploy.fleet.local import open_local
from qdeploy.fleet.manifest import LimitsSpec, LocalSpec, RaySpec
from qdeploy.fleet.rays import open_ray
from qdeploy.fleet.work import Ended, Task


class Executor(Protocol):
    """Cells under way. It knows nothing of what they are, and repeats none."""

    slots: int  # cells at once

    def start(self, task: Task) -> None:
        """Begin a cell; there is a slot for it."""
        ...

    def ended(self, seconds: float) -> list[Ended]:
        """Those that have ended, waiting so long at most for the first."""
        ...

    def close(self) -> None:
        """End whatever is under way."""
        ...


Opener = Callable[..., Executor]
EXECUTORS: Mapping[str, Opener] = {"local": open_local, "ray": open_ray}


def open_executor(spec: LocalSpec | RaySpec, limits: LimitsSpec) -> Executor:
    """The executor that a manifest asks for.

    Raises:
        UsageError: it is not installed, or has no room for a single cell.
    """
    return EXECUTORS[spec.kind](spec, limits)
