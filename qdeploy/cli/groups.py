"""How options are written once, and how a command takes groups of them."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, get_type_hints

import typer


def option(
    flag: str,
    help_text: str,
    panel: str,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
) -> Any:
    """One option of typer; `flag` may name several, separated by spaces."""
    return typer.Option(
        *flag.split(), help=help_text, rich_help_panel=panel, min=at_least, max=at_most
    )


class Group:
    """Options that commands take together. Subclasses are dataclasses of typer's annotations."""

    def settings(self) -> dict[str, Any]:
        """What was said, as keywords of the verbs."""
        return given({field.name: getattr(self, field.name) for field in fields(self)})  # type: ignore[arg-type]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were said."""
    unsaid: tuple[object, ...] = (None, False)
    return {k: v for k, v in options.items() if not any(v is u for u in unsaid) and v != []}


def takes(*groups: type[Group]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes options of its own, and `settings` for `groups`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
            if name != "settings"
        ]
        of_groups = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=get_type_hints(group, include_extras=True)[field.name],
            )
            for group in groups
            for field in fields(group)  # type: ignore[arg-type]
        ]

        @wraps(function)
        def command(**values: Any) -> None:
            settings: dict[str, Any] = {"command": shlex.join(["qdeploy", *sys.argv[1:]])}
            for group in groups:
                names = [field.name for field in fields(group)]  # type: ignore[arg-type]
                settings |= group(**{name: values.pop(name) for name in names}).settings()
            function(**values, settings=settings)

        needed = [p for p in own if p.default is inspect.Parameter.empty]
        parameters = [*needed, *of_groups, *(p for p in own if p not in needed)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate
