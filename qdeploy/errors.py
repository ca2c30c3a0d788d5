"""What can go wrong outside of our control, and the exit code each failure ends with.

| code | meaning |
|---|---|
| 0 | accepted |
| 1 | a bug in qdeploy (the only case that shows a traceback) |
| 2 | bad input, bad usage, or a missing capability of this machine |
| 3 | rejected by the gate |
| 4 | no verdict: something the recipe requires could not be measured |
| 130 | interrupted |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
EXIT_NO_VERDICT = 4
EXIT_INTERRUPTED = 130
NO_MEMORY = "needs more memory than there is"


class QdeployError(Exception):
    """A failure that its reader can act on: where, what was found, what was needed, a hint."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(QdeployError):
    """Options that contradict each other or name something that does not exist."""


class InputError(QdeployError):
    """A file that is damaged, hostile, or not what it was taken for."""


class PlanError(QdeployError):
    """A model that cannot be quantized as the recipe and the device ask."""


class ProviderError(QdeployError):
    """An execution provider that this machine does not have, or that cannot run the file."""


class NoAnswerError(ProviderError):
    """A device elsewhere that is not reached, or no longer answers: nothing was seen of it."""

    exit_code = EXIT_NO_VERDICT


class OutputError(QdeployError):
    """A place that cannot be written to."""


class ShapeError(QdeployError):
    """Arrays whose sizes or values do not fit each other."""


class DivergedError(QdeployError):
    """An optimisation that left the finite numbers; the caller records a degraded layer."""


@contextmanager
def foreign_reader(what: str, *, hint: str | None = None) -> Iterator[None]:
    """Where a library reads a stranger's data: whatever it raises means that the data is bad.

    Such libraries are written for honest files and fail on others in every way there is. Only
    their calls belong inside, so that a mistake of ours is not blamed on the file.

    Raises:
        InputError: `what`, and the first line of the library's complaint.
    """
    try:
        yield
    except QdeployError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}", hint=hint) from error


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
