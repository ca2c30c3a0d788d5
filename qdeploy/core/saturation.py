"""What pairs of 8-bit products lose where they are added in 16 bits, in torch, with gradients.

See `qdeploy.formats.onnx.saturation`, which says where that happens. Only pairs are computed that
can saturate, and of those only the ones that do for the largest of the codes at hand: most never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from qdeploy.core.patches import Window

LOW, HIGH = -(1 << 15), (1 << 15) - 1
POINT = Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))  # a matrix product takes one by one
MOST_AT_ONCE = 1 << 23  # sums of pairs that are in memory at a time


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """The pairs of one product that can saturate, and how the codes lie that they multiply."""

    row: Int64[Tensor, " pairs"]
    places: Int64[Tensor, "2 pairs"]  # in the kernel, row by row
    channels: Int64[Tensor, "2 pairs"]  # of the codes
    weights: Float[Tensor, "2 pairs"]  # integers
    scale: Float[Tensor, " pairs"]  # of a sum of products
    rows: int
    step: float  # of the codes
    zero_point: int
    window: Window | None  # of a convolution; None: a matrix product

    def to(self, device: torch.device) -> Pairs:
        """The same in the memory of `device`."""
        return replace(
            self,
            row=self.row.to(device),
            places=self.places.to(device),
            channels=self.channels.to(device),
            weights=self.weights.to(device),
            scale=self.scale.to(device),
        )


def less_lost(
    exact: Float[Tensor, "images ..."], x: Float[Tensor, "images ..."], pairs: Pairs
) -> Float[Tensor, "images ..."]:
    """The result of a product, less what saturation takes from it.

    Args:
        exact: The result.
        x: What was read from the codes: (images, channels, height, width), or (..., inner axis).
    """
    images = x if pairs.window else x.flatten(0, -2)[..., None, None]
    reached = _reached(images.detach(), pairs)
    if not len(reached):
        return exact
    size = tuple(exact.shape[2:]) if pairs.window else (1, 1)
    lost: Tensor = _Lost.apply(images, pairs, reached, size)  # type: ignore[no-untyped-call]
    return exact - lost.reshape(exact.shape)


def _reached(x: Tensor, pairs: Pairs) -> Int64[Tensor, " reached"]:
    """Those of the pairs that saturate for the largest and smallest of these codes, or might."""
    ends = []
    for end in (x.amin((0, 2, 3)), x.amax((0, 2, 3))):
        of_channel = (end / pairs.step + pairs.zero_point).round()
        ends.append(of_channel[pairs.channels])
    ends = [end(*ends, torch.full_like(ends[0], pairs.zero_point)) for end in (_least, _most)]
    products = [end * pairs.weights for end in ends]
    most, least = torch.maximum(*products).sum(0), torch.minimum(*products).sum(0)
    return ((most > HIGH) | (least < LOW)).nonzero()[:, 0]


def _least(*of: Tensor) -> Tensor:
    return torch.stack(of).amin(0)


def _most(*of: Tensor) -> Tensor:
    return torch.stack(of).amax(0)


class _Lost(torch.autograd.Function):
    """Sums of pairs beyond 16 bits, by row; nothing is kept for the gradient but the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pairs: Pairs, reached: Tensor, size: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, reached)
        ctx.pairs, ctx.size = pairs, size
        codes, found = _codes(x, pairs), x.new_zeros(pairs.rows, len(x), *size)
        for some in _parts(reached, found):
            sums = _sums(codes, pairs, some, size)
            beyond = (sums - sums.clamp(LOW, HIGH)).mul_(_wide(pairs.scale[some]))
            found.index_add_(0, pairs.row[some], beyond)
        return found.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor) -> tuple[Tensor, None, None, None]:
        (x, reached), pairs, size = ctx.saved_tensors, ctx.pairs, ctx.size
        codes, by_row = _codes(x, pairs), wanted[0].transpose(0, 1)
        found = torch.zeros_like(codes)
        for some in _parts(reached, by_row):
            sums = _sums(codes, pairs, some, size)
            through = ((sums > HIGH) | (sums < LOW)) * by_row[pairs.row[some]]
            through = through.mul_(_wide(pairs.scale[some]))
            for place, which, channels, weights in _by_place(pairs, some):
                into = _at(found, pairs, place, size).transpose(0, 1)
                into.index_add_(0, channels, through[which] * _wide(weights))
        (top, bottom), (left, right) = (pairs.window or POINT).pads
        height, width = found.shape[2:]
        inner = found[:, :, top : height - bottom, left : width - right]
        return inner / pairs.step, None, None, None


def _codes(x: Tensor, pairs: Pairs) -> Tensor:
    rows, columns = (pairs.window or POINT).pads
    return F.pad(x / pairs.step + pairs.zero_point, (*columns, *rows), value=pairs.zero_point)


def _at(codes: Tensor, pairs: Pairs, place: int, size: tuple[int, int]) -> Tensor:
    """The codes at one place of the kernel in each patch: (images, channels, height, width)."""
    window = pairs.window or POINT
    down, right = divmod(place, window.kernel[1])
    first = down * window.dilations[0], right * window.dilations[1]
    rows, columns = (
        slice(first[i], first[i] + (size[i] - 1) * window.strides[i] + 1, window.strides[i])
        for i in (0, 1)
    )
    return codes[:, :, rows, columns]


def _sums(codes: Tensor, pairs: Pairs, some: Tensor, size: tuple[int, int]) -> Tensor:
    """Of some pairs: (pairs, images, height, width)."""
    sums = codes.new_zeros(len(some), len(codes), *size)
    for place, which, channels, weights in _by_place(pairs, some):
        taken = _at(codes, pairs, place, size)[:, channels].transpose(0, 1)
        sums[which] += taken * _wide(weights)
    return sums


def _by_place(pairs: Pairs, some: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """First and second codes at each place of the kernel: which pairs', channels, weights."""
    for places, channels, weights in zip(
        pairs.places[:, some], pairs.channels[:, some], pairs.weights[:, some], strict=True
    ):
        for place in places.unique().tolist():
            which = (places == place).nonzero()[:, 0]
            yield place, which, channels[which], weights[which]


def _parts(reached: Tensor, by_row: Tensor) -> tuple[Tensor, ...]:
    """All of these pairs, as many at a time as memory allows."""
    return reached.split(max(1, MOST_AT_ONCE // by_row[0].numel()))


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
