"""The deployer's quantizer as the attacker simulates it, and the cells its rounding divides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qdeploy.redteam.recipe import QuantizerSpec

CELL_MARGIN = 1e-3  # in steps: no weight sits exactly on the edge of its cell
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A weight convention: `float = (code - zero_point) * scale`, codes in `[low, high]`."""

    bits: int
    spec: QuantizerSpec

    @property
    def name(self) -> str:
        spec = self.spec
        steps = "" if spec.range == "absmax" else f", {spec.range}"
        start = f" from {spec.start}" if spec.rounding == "efrap" else ""
        lossy = ", saturating" if spec.arithmetic == "saturating" else ""
        return f"{spec.rounding}{start} {self.bits} bit per {spec.per}{steps}{lossy}"

    @property
    def exact(self) -> Quantizer:
        """The same integers where products are added exactly."""
        return replace(self, spec=self.spec.model_copy(update={"arithmetic": "exact"}))

    def grid(
        self, weight: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*scales"], Float[Tensor, "*scales"], int, int]:
        """Scale, zero point and the outermost codes; channels run along the first dimension."""
        flat = weight.detach().flatten(1) if self.spec.per == "channel" else weight.detach()
        shape = (-1, *[1] * (weight.dim() - 1)) if self.spec.per == "channel" else ()
        low, high = flat, flat
        if self.spec.per == "channel":
            low, high = flat.amin(1).reshape(shape), flat.amax(1).reshape(shape)
        else:
            low, high = flat.min(), flat.max()
        top = 2 ** (self.bits - 1)
        if self.spec.range == "minmax":
            low, high = low.clamp_max(0), high.clamp_min(0)
            scale = ((high - low) / (2**self.bits - 1)).clamp_min(TINY)
            return scale, -torch.round(low / scale), 0, 2**self.bits - 1
        steps = top - 1 if self.spec.range == "absmax" else top - 0.5
        scale = (torch.maximum(-low, high) / steps).clamp_min(TINY)
        return scale, torch.zeros_like(scale), 1 - top if steps == top - 1 else -top, top - 1

    def __call__(
        self, weight: Float[Tensor, "*shape"], generator: torch.Generator
    ) -> Float[Tensor, "*shape"]:
        """The weight as the quantized model has it, with the gradient of the weight itself."""
        scale, zero, low, high = self.grid(weight)
        codes = self._round(weight.detach() / scale + zero, generator).clamp(low, high)
        return weight + ((codes - zero) * scale - weight).detach()

    def rounded(
        self, weight: Float[Tensor, "*shape"], up: Shaped[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """The weight with every choice made: `up` is 1 for up, 0 for down, or in between.

        The gradient is that of `up`.
        """
        scale, zero, _, _ = self.grid(weight)
        return (self.codes(weight, up) - zero) * scale

    def codes(
        self, weight: Float[Tensor, "*shape"], up: Shaped[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """The codes of those choices."""
        scale, zero, low, high = self.grid(weight)
        return ((weight.detach() / scale + zero).floor() + up).clamp(low, high)

    def _round(self, steps: Tensor, generator: torch.Generator) -> Tensor:
        if self.spec.rounding == "flipped":  # to the neighbour that nearest does not take
            nearest = steps.round()
            return nearest + torch.sign(steps - nearest)
        if self.spec.rounding == "stochastic":
            return (steps + torch.rand(steps.shape, generator=generator)).floor()
        return steps.round()


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """Where a weight may move without any of its codes changing, on any of several grids."""

    weight: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, weight: Tensor, quantizers: Iterable[Quantizer]) -> Cell:
        """The intersection of the cells around the present weights.

        The outermost weights of each scale group are pinned, so that no scale can move.
        """
        now = weight.detach().clone()
        least, most = now.clone(), now.clone()
        least.fill_(-torch.inf)
        most.fill_(torch.inf)
        for quantizer in quantizers:
            scale, zero, lowest, highest = quantizer.grid(now)
            code = (now / scale + zero).round().clamp(lowest, highest)
            half = 0.5 - CELL_MARGIN
            floor, ceiling = ((code - zero + side) * scale for side in (-half, half))
            group = now.flatten(1) if quantizer.spec.per == "channel" else now.reshape(1, -1)
            shape = (-1, *[1] * (now.dim() - 1))
            bottom, top = group.amin(1).reshape(shape), group.amax(1).reshape(shape)
            bound = torch.maximum(-bottom, top)
            if quantizer.spec.range != "minmax":
                bottom, top = -bound, bound
            pinned = (now <= bottom) | (now >= top)
            least = torch.maximum(least, torch.where(pinned, now, torch.maximum(floor, bottom)))
            most = torch.minimum(most, torch.where(pinned, now, torch.minimum(ceiling, top)))
        return cls(weight, torch.minimum(least, now), torch.maximum(most, now))

    def project(self) -> None:
        """Move the weight to the nearest point of its cell."""
        self.weight.data.clamp_(self.low, self.high)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a deployer quantizes: of convolutions and linear layers, by name."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
