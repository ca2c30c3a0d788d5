"""The exit code that says what came of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from qdeploy.judging.verdict import Outcome


def leave_by(outcome: Outcome) -> None:
    """Leave with the code of an outcome: 0, 3 or 4."""
    from qdeploy.judging.verdict import EXIT_CODE

    raise typer.Exit(EXIT_CODE[outcome])
