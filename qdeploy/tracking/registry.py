"""Models that are registered with MLflow, brought here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qdeploy.disk.files import make_folder
from qdeploy.errors import InputError
from qdeploy.progress import Progress
from qdeploy.tracking.server import Server, connected

SCHEME = "models:/"


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model, and the folder that holds its files here."""

    name: str  # NAME/N
    path: Path


def fetch(uri: str, tracking_uri: str, folder: Path, progress: Progress) -> tuple[Version, ...]:
    """Bring what `uri` means into `folder`, one folder for each version; what is there is kept.

    Args:
        uri: models:/NAME/VERSION, models:/NAME@ALIAS, models:/NAME for its newest version, or
            a pattern of names for the newest of each.

    Raises:
        InputError: there is no such model, or the registry does not answer.
        UsageError: MLflow is not installed.
    """
    with connected(tracking_uri) as server:
        wanted = tuple(_meant(uri.removeprefix(SCHEME), server))
        if not wanted:
            raise InputError(f"{uri}: no such model at {tracking_uri}")
        return tuple(
            Version(f"{name}/{number}", _brought(server, name, number, folder))
            for name, number in progress.track(wanted, "fetch models", len(wanted))
        )


def _meant(text: str, server: Server) -> Iterator[tuple[str, str]]:
    """Names and version numbers."""
    name, at, alias = text.partition("@")
    if at:
        yield name, server.aliased(name, alias)
        return
    name, slash, number = text.partition("/")
    if slash:
        yield name, number
        return
    for found, newest in server.newest_versions():
        if fnmatchcase(found, name):
            yield found, newest


def _brought(server: Server, name: str, number: str, folder: Path) -> Path:
    """A version never changes, so that what is here is it."""
    safe = re.sub(r"[^\w.-]", "_", f"{name}-{number}")
    place, whole = folder / safe, folder / f"{safe}.whole"
    if not whole.exists():
        make_folder(place)
        server.download_version(name, number, place)
        whole.touch()
    return place
