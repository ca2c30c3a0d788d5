"""Which folders may be read: what a stranger's card or link names must lie in one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdeploy.errors import InputError

HINT = "allow it with --data-root FOLDER, if you know what lies there"


def resolved(path: Path, *, what: str) -> Path:
    """Where `path` leads, all links followed.

    Raises:
        InputError: its links lead in a circle, or it is no path at all.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{what} {path}: cannot be followed: {error}") from error


def require_within(path: Path, roots: Sequence[Path], *, what: str, whose: str) -> Path:
    """Where `path` leads, if that lies in one of `roots`, links followed.

    Args:
        roots: Folders, themselves resolved.
        whose: What the roots are to the reader, as "the folder of the model card m.toml".

    Raises:
        InputError: it leads elsewhere.
    """
    place = resolved(path, what=what)
    if not any(place.is_relative_to(root) for root in roots):
        raise InputError(f"{what} {path}: lies outside of {whose}", hint=HINT)
    return place
