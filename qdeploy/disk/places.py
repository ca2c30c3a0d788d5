"""Where results go: never over what is read, nor over each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qdeploy.errors import UsageError

Named = tuple[str, Path]  # what the place is, in words or as an option, and where it is


def refuse_overlaps(written: Sequence[Named], read: Iterable[Named]) -> None:
    """Find out before the work that a result would replace what it is made from, or another one.

    Two names are one place if they lead to one file: by links, by hard links, or spelt otherwise.

    Raises:
        UsageError: a place that is written to is read from, or written to twice.
    """
    sources = list(read)
    for at, (name, path) in enumerate(written):
        for other_name, other in (*sources, *written[:at]):
            if same_place(path, other):
                raise UsageError(
                    f"{name} {path}: is {other_name} {other} too, which would be lost",
                    hint="give it another name",
                )


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, there already or not.

    A path whose links lead in a circle, or that is none, leads to no file.
    """
    try:
        if one.resolve() == other.resolve():
            return True
        return one.samefile(other)
    except (OSError, RuntimeError, ValueError):  # one is not there yet, a circle, a zero byte
        return False
