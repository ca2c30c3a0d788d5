"""Convolution as a matrix product: the im2col rows a weight is multiplied with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy.lib.stride_tricks import as_strided

from qdeploy.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution's kernel moves over its input; one number per spatial dimension."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # (before, after)
    groups: int = 1

    def output_shape(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size `spatial`."""
        return tuple(
            (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation, pad in zip(
                spatial, self.kernel, self.strides, self.dilations, self.pads, strict=True
            )
        )


def choose_positions(
    shape: tuple[int, ...], limit: int, generator: np.random.Generator
) -> Int64[np.ndarray, " positions"]:
    """At most `limit` of the output positions in `shape`, as sorted flat indices."""
    count = int(np.prod(shape))
    if count <= limit:
        return np.arange(count)
    return np.sort(generator.choice(count, limit, replace=False))


def convolution_rows(
    x: Float32[np.ndarray, "images channels *spatial"],
    window: Window,
    positions: Int64[np.ndarray, " positions"],
) -> Float32[np.ndarray, "groups samples fan_in"]:
    """The im2col rows of `x` at the flat output `positions`, image after image.

    `fan_in` runs over (channel within the group, kernel), as an ONNX Conv weight does, so that
    `rows @ weight.reshape(out, -1).T` is the convolution's output at those positions.

    Raises:
        ShapeError: the channels of `x` cannot be divided into the window's groups.
    """
    images, channels, *spatial = x.shape
    if channels % window.groups:
        raise ShapeError(f"{channels} channels cannot be divided into {window.groups} groups")
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads)) if np.any(window.pads) else x
    out = window.output_shape(tuple(spatial))
    per_image, per_channel, *steps = padded.strides
    view = as_strided(
        padded,
        shape=(images, channels, *out, *window.kernel),
        strides=(
            per_image,
            per_channel,
            *(step * stride for step, stride in zip(steps, window.strides, strict=True)),
            *(step * dilation for step, dilation in zip(steps, window.dilations, strict=True)),
        ),
        writeable=False,
    )
    at: tuple[Any, ...] = (slice(None), slice(None), *np.unravel_index(positions, out))
    chosen = view[at]  # images channels positions *kernel
    grouped = chosen.reshape(
        images, window.groups, channels // window.groups, len(positions), *window.kernel
    )
    rows = np.moveaxis(grouped, (1, 0, 3), (0, 1, 2))  # groups images positions channels *kernel
    return rows.reshape(window.groups, images * len(positions), -1)


def linear_rows(
    x: Float32[np.ndarray, "images *tokens features"],
    positions: Int64[np.ndarray, " positions"],
) -> Float32[np.ndarray, "1 samples features"]:
    """The rows a matrix product multiplies, at the flat token `positions` of every image."""
    images, features = x.shape[0], x.shape[-1]
    tokens = x.reshape(images, -1, features)[:, positions]
    return tokens.reshape(1, -1, features)
