"""How long work reports on itself, without knowing of terminals."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Receives the names of the stages and the steps inside them."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A stage that is under way while the context is open."""
        ...

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Hand `items` through, and show how many of `total` have passed."""
        ...

    def note(self, text: str) -> None:
        """One line that belongs to the current stage."""
        ...


class _Silent:
    def stage(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:  # noqa: ARG002
        return iter(items)

    def note(self, text: str) -> None:
        """Say nothing."""


SILENT: Progress = _Silent()


@dataclass(slots=True)
class Clock:
    """Tells the progress which stage is under way, and keeps how long each one took."""

    progress: Progress
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    times: list[tuple[str, float, float]] = field(default_factory=list)  # name, wall, CPU seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage whose time is taken while the context is open."""
        began, worked = time.perf_counter(), _cpu_seconds()
        with self.progress.stage(name):
            yield
        self.times.append((name, time.perf_counter() - began, _cpu_seconds() - worked))


def _cpu_seconds() -> float:
    """Of all threads of this process, and of those that it has waited for."""
    return sum(os.times()[:4])
