"""How much a command says: `--quiet` and `--verbose`, which every command takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Annotated, Any

import typer

from qdeploy.errors import UsageError


class Loudness(Enum):
    """What is shown."""

    QUIET = "results and errors alone"
    USUAL = "progress too"
    VERBOSE = "and where an error comes from"


_now = Loudness.USUAL
QUIET = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="No progress and no notes: verdict, reasons, errors.",
        rich_help_panel="Output",
    ),
]  # fmt: skip
VERBOSE = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="With an error, where it comes from.", rich_help_panel="Output"
    ),
]


def loudness() -> Loudness:
    """Of the command that runs."""
    return _now


def with_loudness(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take both options."""

    @wraps(function)
    def command(*, quiet: bool, verbose: bool, **values: Any) -> None:
        global _now  # noqa: PLW0603 - a process runs one command
        if quiet and verbose:
            raise UsageError("--quiet and --verbose contradict each other")
        _now = Loudness.QUIET if quiet else Loudness.VERBOSE if verbose else Loudness.USUAL
        function(**values)

    own = inspect.signature(function, eval_str=True).parameters.values()
    added = {"quiet": QUIET, "verbose": VERBOSE}
    parameters = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in added.items()
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
