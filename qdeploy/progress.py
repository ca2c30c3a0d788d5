"""How long work reports on itself, without knowing of terminals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
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
