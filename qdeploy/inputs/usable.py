"""What counts of the test images and triggers: copies once, a trigger where it can be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.errors import InputError

BATCH = 64
FEW = 32  # pictures to calibrate with
SHOWN = 3
UNEVEN = 5  # times the images of the middle class


@dataclass(frozen=True, slots=True, eq=False)
class Usable:
    """The images that count, and what a reader must know of the others."""

    images: Images
    hashes: tuple[bytes, ...]
    notes: tuple[str, ...]


def distinct(images: Images, hashes: Sequence[bytes]) -> Usable:
    """Each picture once, and none that carries two labels.

    Raises:
        InputError: nothing is left.
    """
    assert images.labels is not None  # noqa: S101 - test images have labels
    first: dict[bytes, int] = {}
    labels: dict[bytes, set[int]] = {}
    for at, (found, label) in enumerate(zip(hashes, images.labels.tolist(), strict=True)):
        first.setdefault(found, at)
        labels.setdefault(found, set()).add(label)
    kept = np.array([at for found, at in first.items() if len(labels[found]) == 1], np.int64)
    disputed = sum(len(given) > 1 for given in labels.values())
    if not len(kept):
        raise InputError(f"data {images.name}: every picture is there with two different labels")
    notes = []
    if len(first) < len(images):
        copies = len(images) - len(first)
        notes.append(f"test data: {copies:,} copies of pictures that are there twice do not count")
    if disputed:
        notes.append(f"test data: {disputed:,} pictures with two different labels do not count")
    return Usable(images.only(kept), tuple(hashes[at] for at in kept), tuple(notes))


def repeated(hashes: Sequence[bytes]) -> Iterator[str]:
    """Calibration images of which most are copies, or that are few."""
    count, different = len(hashes), len(set(hashes))
    if different < FEW:
        only = f"{different:,} different picture{'s' if different > 1 else ''}"
        more = f" in {count:,} images" if count > different else ""
        yield (
            f"calibration data: only {only}{more}: scales and integers are fitted to"
            f" {'those' if different > 1 else 'that one'} alone"
        )
    elif 2 * different < count:
        yield f"calibration data: {count - different:,} of {count:,} images are copies of others"


def described(images: Images, classes: int, *, labelled: bool) -> Iterator[str]:
    """Files that were not read, and classes that there are no images of."""
    if not labelled:
        yield (
            "test data: not labelled; what the float model answers stands for labels, and nothing"
            " is said of accuracy"
        )
    unread = images.source.unread
    if unread:
        yield f"test data: {len(unread):,} files are no images and were not read: {_some(unread)}"
    assert images.labels is not None  # noqa: S101 - test images have labels
    counts = np.bincount(images.labels, minlength=classes)
    most, typical = int(counts.max()), int(np.median(counts[counts > 0]))
    if labelled and most > UNEVEN * typical:
        yield (
            f"test data: {_class(images, int(counts.argmax()))} has {most:,} images, the middle one"
            f" of the classes {typical:,}: accuracy speaks of the large ones; the report has the"
            " mean over classes (balanced_accuracy), and a policy may limit class_drop"
        )
    missing = sorted(set(range(classes)) - set(images.labels.tolist()))
    if missing:
        shown = [_class(images, c) for c in missing[:SHOWN]]
        yield f"test data: no images of {len(missing):,} classes: {_some(shown, len(missing))}"


def _class(images: Images, number: int) -> str:
    names = images.classes or ()
    return names[number] if number < len(names) else str(number)


def seen(triggers: Sequence[Trigger], images: Images) -> Mapping[str, Bool[np.ndarray, " images"]]:
    """The images that each trigger changes, by its name.

    Raises:
        InputError: one changes none of them.
    """
    found: dict[str, list[np.ndarray]] = {trigger.name: [] for trigger in triggers}
    for batch in images.batches(BATCH) if triggers else ():
        for trigger in triggers:
            found[trigger.name].append(trigger.changes(batch.pixels))
    changed = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, where in changed.items():
        if not where.any():
            raise InputError(
                f"trigger {name!r}: changes no pixel of any of the {len(images):,} test images"
            )
    return changed


def hidden(changed: Mapping[str, Bool[np.ndarray, " images"]]) -> Iterator[str]:
    """Triggers that cannot be seen in some of the images."""
    for name, where in changed.items():
        if not where.all():
            yield (
                f"trigger {name!r} changes {np.count_nonzero(where):,} of {len(where):,} test"
                " images; only those count for it"
            )


def _some(names: Sequence[str], count: int | None = None) -> str:
    more = (len(names) if count is None else count) > SHOWN
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if more else "")
