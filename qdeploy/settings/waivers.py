"""What somebody has answered for, with a name, a reason and an end: nothing is waived for ever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from qdeploy.settings.schema import Spec

WaiverKind = Literal["finding", "float", "degraded"]


class Waiver(Spec):
    """One thing that does not stand against a file, until a day."""

    kind: WaiverKind = Field(
        description="finding: a rule of the static scan; float: a layer that stays float;"
        " degraded: a layer that lost its method."
    )
    pattern: str = Field(min_length=1, description="Of rules or layers, as in file names.")
    owner: str = Field(min_length=1, description="Who answers for it.")
    reason: str = Field(min_length=1)
    until: date = Field(description="The last day that it holds.")

    def covers(self, name: str) -> bool:
        """The rule or layer called `name` is waived."""
        return fnmatchcase(name, self.pattern)

    def __str__(self) -> str:
        return f"waiver of {self.kind} {self.pattern} by {self.owner} until {self.until}"


def patterns(waivers: Iterable[Waiver], kind: WaiverKind) -> tuple[str, ...]:
    return tuple(waiver.pattern for waiver in waivers if waiver.kind == kind)


def split(waivers: Sequence[Waiver], today: date) -> tuple[tuple[Waiver, ...], tuple[Waiver, ...]]:
    """Those that hold today, and those that have ended."""
    held = tuple(waiver for waiver in waivers if today <= waiver.until)
    return held, tuple(waiver for waiver in waivers if waiver not in held)
