"""Which of a tensor's dimensions are an image's channels, height and width."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qdeploy.errors import InputError, UsageError
from qdeploy.settings.card import Layout
from qdeploy.values import SHAPE_HINT, Stated

Shape = tuple[int, int, int]
Sizes = tuple[int | None, ...]  # None: left open

IMAGE_CHANNELS = frozenset({1, 3})
RANKS = frozenset({2, 3, 4})  # flat, without channels, images


def image_shape(sizes: Sizes, stated: Stated, what: str) -> tuple[Shape, Layout]:
    """Channels, height and width, and where the channels are.

    Raises:
        InputError: no image has such a shape.
        UsageError: the shape must be stated, or is another.
    """
    if len(sizes) not in RANKS:
        raise InputError(
            f"{what} takes {plain(sizes)}; images have batch, channels, height and width"
        )
    if stated.shape is None:
        return _own_shape(sizes, stated, what)
    if len(sizes) != 4:
        if _fits(sizes, _inner_shape(len(sizes), stated.shape)):
            return stated.shape, "channels-first"
    else:
        layouts: tuple[Layout, ...] = ("channels-first", "channels-last")
        for layout in layouts[::-1] if stated.layout == "channels-last" else layouts:
            if _fits(sizes, _of_layout(stated.shape, layout)):
                return stated.shape, layout
    raise UsageError(
        f"{what} takes {plain(sizes[1:])}, not {plain(stated.shape)} as is stated",
        hint="the shape in a card or after --input-shape is channels, height, width",
    )


def _own_shape(sizes: Sizes, stated: Stated, what: str) -> tuple[Shape, Layout]:
    """What the file itself says.

    Raises:
        UsageError: it does not.
    """
    inner = [size for size in sizes[1:] if size is not None]
    if len(inner) != 3:
        open_ = "which leaves the size of images open" if len(sizes) == 4 else "not images"
        raise UsageError(f"{what} takes {plain(sizes)}, {open_}", hint=SHAPE_HINT)
    first, second, third = inner
    if (stated.layout or likely_layout(inner)) == "channels-last":
        return (third, first, second), "channels-last"
    return (first, second, third), "channels-first"


def likely_layout(inner: Sequence[int | None]) -> Layout:
    """Where the channels are, by which of the dimensions could be theirs."""
    last = inner[0] not in {*IMAGE_CHANNELS, None} and inner[2] in IMAGE_CHANNELS
    return "channels-last" if last else "channels-first"


def _inner_shape(rank: int, shape: Shape) -> tuple[int, ...]:
    """What a file that takes no channels takes for an image of that shape."""
    if rank == 2:
        return (math.prod(shape),)
    return shape[1:] if shape[0] == 1 else ()


def _of_layout(shape: Shape, layout: Layout) -> tuple[int, ...]:
    return shape if layout == "channels-first" else (*shape[1:], shape[0])


def _fits(sizes: Sizes, wanted: Sequence[int]) -> bool:
    return len(sizes) == len(wanted) + 1 and all(
        size in {None, want} for size, want in zip(sizes[1:], wanted, strict=True)
    )


def plain(sizes: Sequence[int | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"
