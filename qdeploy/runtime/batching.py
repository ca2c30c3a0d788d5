"""Whether a file's answer to an image depends on the images that share its batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from qdeploy.runtime.answers import argmax
from qdeploy.runtime.known import Runner

PROBES, FEWEST_PROBES = 256, 128  # of small images and of large ones; 128 of 128 is 97 % at least
LARGE = 1 << 16  # values of an image
BATCH = 32
MOST, FEWEST, SMALL = 64, 4, 16  # of a batch
BATCH_VALUES = 1 << 21  # at 224 pixels 13 images: what a network keeps of 64 can be 9 GB
BLACK, WHITE, COPY, NOISY, SOME_OF_EACH = range(5)  # strangers
# Kernels of other batch sizes add in another order: half of the lead that a tenth of probes lack.
NOISE, DECIDED = 0.5, 0.1
LAST_DIGITS = 8 * np.finfo(np.float32).eps


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    images: np.ndarray
    rows: np.ndarray  # where the probes are in it
    probes: np.ndarray  # which ones they are


def probes_of(shape: tuple[int, ...]) -> int:
    """How many images of this shape are asked about."""
    return FEWEST_PROBES if np.prod(shape) > LARGE else PROBES


def same_in_any_batch(
    session: Runner, probes: Float32[np.ndarray, "probes channels height width"], seed: int
) -> Bool[np.ndarray, " probes"]:
    """Which probes are answered alike in whatever batch they come.

    In batches of `BATCH` they are compared with the same probes alone, in another order in batches
    of drawn sizes, and among strangers: black, white, noise, and copies of one image. An answer is
    another one if the class is and a logit moved by more than noise.

    Args:
        probes: As the file takes them.
        seed: Of orders, sizes and strangers; whoever made the file must not know it.
    """
    rng = np.random.default_rng(seed)
    most = _most(probes)
    wanted = _logits(session, _in_order(probes, _together(probes)))
    alike = np.ones(len(probes), bool)
    for batches in (
        _in_order(probes, 1),
        _drawn(probes, most, rng),
        _among_strangers(probes, most, rng),
    ):
        alike &= _alike(_logits(session, batches), wanted)
    return alike


def _most(probes: np.ndarray) -> int:
    """Of a batch."""
    return int(np.clip(BATCH_VALUES // np.prod(probes.shape[1:]), FEWEST, MOST))


def _together(probes: np.ndarray) -> int:
    """The size of the batches that others are compared with."""
    return min(BATCH, _most(probes))


def _alike(found: np.ndarray, wanted: np.ndarray) -> Bool[np.ndarray, " probes"]:
    """The same class, or logits that moved by less than nearly all probes are decided by.

    A file can stretch the range of its logits, but not the lead of its answers without deciding
    them: less than a tenth of the probes can hide behind the others. Or they moved by less than
    float32 tells apart at that size.
    """
    with np.errstate(invalid="ignore"):
        best = np.sort(wanted, axis=1)[:, -2:]
        leads = (best[:, -1] - best[:, 0])[np.isfinite(wanted).all(axis=1)]
        lead = NOISE * np.quantile(leads, DECIDED) if len(leads) else 0.0
        least = LAST_DIGITS * np.abs(best).max(axis=1)
        still = np.abs(found - wanted).max(axis=1) <= np.maximum(lead, least)
    return still | (argmax(found) == argmax(wanted))


def _logits(session: Runner, batches: Iterator[_Batch]) -> np.ndarray:
    """By probe, whatever the order of the batches."""
    rows, which = [], []
    for batch in batches:
        rows.append(session.logits(batch.images)[batch.rows])
        which.append(batch.probes)
    return np.concatenate(rows)[np.argsort(np.concatenate(which))]


def _in_order(probes: np.ndarray, size: int) -> Iterator[_Batch]:
    for first in range(0, len(probes), size):
        part = np.arange(first, min(first + size, len(probes)))
        yield _Batch(probes[part], np.arange(len(part)), part)


def _drawn(probes: np.ndarray, most: int, rng: np.random.Generator) -> Iterator[_Batch]:
    """In another order, in batches of 2 to `most`, of odd sizes and of even ones."""
    left = rng.permutation(len(probes))
    while len(left):
        size = int(rng.integers(2, most + 1))
        yield _Batch(probes[left[:size]], np.arange(len(left[:size])), left[:size])
        left = left[size:]


def _among_strangers(probes: np.ndarray, most: int, rng: np.random.Generator) -> Iterator[_Batch]:
    """A quarter of each batch, of small ones half, at drawn places; every kind equally often."""
    size = max(most // 2, 2)
    each = max(size // (4 if size > SMALL else 2), 1)
    order = rng.permutation(len(probes))
    parts = np.array_split(order, -(-len(order) // each))
    kinds = rng.permutation(np.arange(len(parts)) % (SOME_OF_EACH + 1))
    for part, kind in zip(parts, kinds, strict=True):
        images = _strangers(probes, size, int(kind), rng)
        rows = rng.choice(size, len(part), replace=False)
        images[rows] = probes[part]
        yield _Batch(images, rows, part)


def _strangers(probes: np.ndarray, count: int, drawn: int, rng: np.random.Generator) -> np.ndarray:
    """All black, all white, all one image, all noise, or some of each."""
    low, high = probes.min(), probes.max()
    found = rng.uniform(low, high, (count, *probes.shape[1:])).astype(np.float32)
    mixed = drawn == SOME_OF_EACH
    kind = rng.integers(SOME_OF_EACH, size=count) if mixed else np.full(count, drawn)
    found[kind == BLACK], found[kind == WHITE] = low, high
    found[kind == COPY] = probes[rng.integers(len(probes))]
    return found
