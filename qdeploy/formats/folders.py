"""The model files in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError
from qdeploy.formats.safetensors_index import ENDING, LARGEST_INDEX_BYTES, shards

SUFFIXES = frozenset({
    ".onnx", ".pt", ".pth", ".pt2", ".ckpt", ".bin", ".pkl", ".pickle", ".safetensors",
    ".torchscript", ".ort",
})  # fmt: skip


def model_files(folder: Path) -> tuple[Path, ...]:
    """Every file under `folder` that is called as models are; the parts of one as their index.

    Links to folders are not followed.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        found += _of(Path(place), sorted(names))
    return tuple(found)


def _of(folder: Path, names: list[str]) -> Iterator[Path]:
    indices = [folder / name for name in names if name.endswith(ENDING)]
    parts = {part for index in indices for part in _parts(index)}
    yield from indices
    for name in names:
        path = folder / name
        if path.suffix.lower() in SUFFIXES and path not in parts:
            yield path


def _parts(index: Path) -> frozenset[Path]:
    """None of one that cannot be read: they are then looked at one by one."""
    try:
        return frozenset(shards(index, read_bounded(index, LARGEST_INDEX_BYTES, what="model")))
    except InputError:
        return frozenset()
