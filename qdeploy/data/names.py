"""Names of files in a set of images: which are images, and which are left unread."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff",
})  # fmt: skip
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's
LABELS = "labels.csv"  # file,label
LARGEST_TEXT_BYTES = 64 << 20
LEFT_BEHIND = frozenset({"thumbs.db", "desktop.ini", ANNOTATIONS})


def sort_names(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of `names` that are images and those that are not, sorted.

    What operating systems leave behind is neither.
    """
    images: list[str] = []
    others: list[str] = []
    for path in map(PurePosixPath, names):
        if any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        if path.suffix.lower() in SUFFIXES:
            images.append(str(path))
        elif path.name.lower() not in LEFT_BEHIND:
            others.append(str(path))
    return tuple(sorted(images)), tuple(sorted(others))
