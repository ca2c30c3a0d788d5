"""Models that are registered with MLflow, brought here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qdeploy.disk.files import file_sha256, make_folder, remove, write_atomically
from qdeploy.disk.state import opened, sealed
from qdeploy.errors import InputError
from qdeploy.progress import Progress
from qdeploy.tracking.server import Server, connected

SCHEME = "models:/"
CONTEXT = "registered model"


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model, and the folder that holds its files here."""

    name: str  # NAME/N
    path: Path


def fetch(
    uri: str, tracking_uri: str, folder: Path, key: bytes, progress: Progress
) -> tuple[Version, ...]:
    """Bring what `uri` means into `folder`, one folder for each version; what is there is kept.

    Args:
        key: Of what was brought before: what it has not sealed is brought anew.
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
            Version(f"{name}/{number}", _brought(server, name, number, folder, key))
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


def _brought(server: Server, name: str, number: str, folder: Path, key: bytes) -> Path:
    """A version never changes, so that what was brought here, and is as it was, is it."""
    digest = hashlib.sha256(f"{server.uri}\0{name}\0{number}".encode()).hexdigest()
    place = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:60]}-{number}-{digest[:16]}"
    seal = place.with_name(f"{place.name}.sealed")
    known = opened(seal.read_bytes(), CONTEXT, digest, key=key) if seal.is_file() else None
    if known is None or place.is_symlink() or known != _listing(place):
        remove(place)
        make_folder(place)
        server.download_version(name, number, place)
        write_atomically(seal, sealed(_listing(place), CONTEXT, digest, key=key))
    return place


def _listing(folder: Path) -> bytes:
    """Names and digests of what is in a folder."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    lines = [f"{path.relative_to(folder)!r} {file_sha256(path, what='model')}" for path in files]
    return "\n".join(lines).encode()
