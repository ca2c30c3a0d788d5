"""Signed statements of what was found out about a file: in-toto in DSSE envelopes, and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qdeploy.errors import UsageError


@contextmanager
def libraries_of(extra: str) -> Iterator[None]:
    """Where libraries are imported that come with an extra.

    Raises:
        UsageError: one of them is not installed.
    """
    try:
        yield
    except ImportError as missing:
        package = (missing.name or extra).split(".")[0]
        raise UsageError(
            f"this needs {package}, which is not installed",
            hint=f"pip install 'qdeploy[{extra}]'",
        ) from missing
