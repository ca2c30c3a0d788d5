"""The models that a manifest means."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

from qdeploy.disk.printable import printable
from qdeploy.errors import InputError
from qdeploy.fleet.manifest import ModelsSpec
from qdeploy.formats.folders import model_files
from qdeploy.progress import Progress
from qdeploy.tracking.registry import fetch


@dataclass(frozen=True, slots=True)
class Listed:
    """A model of the fleet, and what is said of it."""

    path: Path
    name: str  # how it is called in reports
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where models of a registry are put, and the key that seals them."""

    folder: Path
    key: bytes


def list_models(
    specs: tuple[ModelsSpec, ...], folder: Path, fetched: Fetched, progress: Progress
) -> tuple[Listed, ...]:
    """Every model once, in the order of the manifest.

    Args:
        folder: What paths are relative to.
        fetched: Where those of a registry are put.

    Raises:
        InputError: a pattern matches nothing, or a registry fails.
        UsageError: MLflow is not installed.
    """
    found: dict[Path, Listed] = {}
    for spec in specs:
        for path, name in _of(spec, folder, fetched, progress):
            found.setdefault(path, Listed(path, printable(name), spec.options))
    return tuple(_distinct(found))


def _of(
    spec: ModelsSpec, folder: Path, fetched: Fetched, progress: Progress
) -> Iterator[tuple[Path, str]]:
    if spec.uri is not None and spec.tracking_uri is not None:
        for version in fetch(spec.uri, spec.tracking_uri, fetched.folder, fetched.key, progress):
            for path in _needed(model_files(version.path), spec.uri, "holds no model"):
                yield path, version.name
        return
    pattern = spec.path or ""
    matches = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 - absolute too
    places = [folder / match for match in sorted(matches)]
    for place in _needed(tuple(places), pattern, "no file is called so"):
        paths = (
            _needed(model_files(place), pattern, "holds no model") if place.is_dir() else (place,)
        )
        for path in paths:
            if path.suffix != ".toml":  # the card of a model, which a pattern may match too
                yield path, path.name


def _needed(found: tuple[Path, ...], pattern: str, complaint: str) -> tuple[Path, ...]:
    if not found:
        raise InputError(f"fleet manifest: models {pattern!r}: {complaint}")
    return found


def _distinct(found: Mapping[Path, Listed]) -> Iterator[Listed]:
    """With as much of their folders in the names as tells models apart that are called alike."""
    alike: dict[str, list[Path]] = {}
    for path, one in found.items():
        alike.setdefault(one.name, []).append(path)
    shared = {name: commonpath(p.parent for p in paths) for name, paths in alike.items()}
    for path, one in found.items():
        if len(alike[one.name]) == 1:
            yield one
        else:
            name = path.relative_to(shared[one.name]).as_posix()
            yield Listed(path, printable(name), one.options)
