"""Roundings and biases of a whole network chosen at once, so that it answers as the float model.

Layers that are rounded one by one do not see what only all of them together add up to, and that is
where an attacker who trains against layer-wise rounding hides. Here every weight keeps one of its
two neighbours, by a number h in [0, 1] that a straight-through gradient moves (up where h > 1/2;
Bengio et al., 2013; Courbariaux et al., BinaryConnect, 2015), and the loss is

    KL(F(x) || Q(x)) + KL(F(x + d) || Q(x + d))

F being the float model and d a perturbation that is sought against the current integers, if any.
Madry et al., ICLR 2018, do the same to weights; here only roundings and biases can move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from qdeploy.core.gradient_memory import images_at_once
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError

# How far from 1/2 a choice begins: the more, the farther off the neighbour is that it did not take,
# so that not all of them turn at once.
NEAREST_START, SPREAD = 0.1, 0.4
Disturbance = Callable[[Tensor], Tensor]  # from pixels to perturbed pixels, at every step anew


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """How long is trained, and how fast."""

    steps: int
    images: int  # plain ones of a step, and as many perturbed ones
    learning_rate: float = 0.02  # of choices; to 0 along a line, as the next
    bias_rate: float = 1e-4


class Choices:
    """For every weight of a layer h in [0, 1]: its upper neighbour above 1/2, else the lower.

    A weight on a code, or with a code that is no neighbour, keeps what it has.
    """

    def __init__(
        self,
        problem: RoundingProblem,
        codes: Int32[np.ndarray, "groups rows fan_in"],
        device: torch.device,
    ) -> None:
        floor = problem.floor
        up = codes - problem.zero_point[:, :, None] - floor
        self._problem, self._codes = problem, codes
        self._fixed = problem.dequantized(codes).astype(np.float32)
        self.free: Bool[np.ndarray, "groups rows fan_in"] = problem.free & ((up == 0) | (up == 1))
        self._held = torch.from_numpy(self._fixed).to(device)
        self._free = torch.from_numpy(self.free).to(device)
        self._floor = torch.from_numpy(floor.astype(np.float32)).to(device)
        self._scale = torch.from_numpy(problem.scale)[:, :, None].to(device)
        fraction = problem.steps - floor
        other = np.where(up > 0.5, fraction, 1 - fraction)  # how far the other neighbour is
        start = 0.5 + np.where(up > 0.5, 1, -1) * (NEAREST_START + SPREAD * other)
        self.h = torch.from_numpy(start.astype(np.float32)).to(device).requires_grad_()

    def weight(self) -> Float[Tensor, "groups rows fan_in"]:
        """The weights as they are rounded now, with gradients to the choices."""
        up = (self.h > 0.5).float() + self.h - self.h.detach()
        return torch.where(self._free, (self._floor + up) * self._scale, self._held)

    def codes(self) -> Int32[np.ndarray, "groups rows fan_in"]:
        """The codes as they are now."""
        up = (self.h.detach() > 0.5).cpu().numpy()
        return np.where(self.free, self._problem.codes(up), self._codes)

    def clip(self) -> None:
        """Keep every h in [0, 1]."""
        with torch.no_grad():
            self.h.clamp_(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A quantized network as a function of its weights and biases, beside its float model."""

    quantized: Callable[[Mapping[str, Tensor], Tensor], Tensor]  # parameters, pixels -> logits
    reference: Callable[[Tensor], Tensor]  # pixels -> logits
    weights: Mapping[str, tuple[Choices, Callable[[Tensor], Tensor]]]  # by tensor; to its layout
    biases: Mapping[str, Tensor]  # by tensor; they learn

    def parameters(self) -> dict[str, Tensor]:
        """Every tensor as it is now, with gradients."""
        weights = {
            name: layout(choices.weight()) for name, (choices, layout) in self.weights.items()
        }
        return {**weights, **self.biases}

    def answers(self) -> Callable[[Tensor], Tensor]:
        """The network as it is now, from pixels to logits."""
        with torch.no_grad():
            frozen = {name: value.detach() for name, value in self.parameters().items()}
        return lambda pixels: self.quantized(frozen, pixels)


def choose_end_to_end(
    network: Network,
    pixels: Float[Tensor, "images channels height width"],
    spec: EndToEnd,
    generator: torch.Generator,
    steps: Iterable[int],
    disturbance: Disturbance | None = None,
) -> None:
    """Move the choices and biases of `network`, in place.

    Args:
        steps: What is iterated over: as many as `spec` says, perhaps with progress shown.
        disturbance: Perturbs images against the network as it is at that step.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    choices = [held.h for held, _ in network.weights.values()]
    optimizer = torch.optim.Adam(
        [
            {"params": choices, "lr": spec.learning_rate},
            {"params": list(network.biases.values()), "lr": spec.bias_rate},
        ]
    )
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / spec.steps)
    at_a_time: int | None = None
    for step in steps:
        drawn = torch.randint(len(pixels), (min(spec.images, len(pixels)),), generator=generator)
        shown = pixels[drawn.to(pixels.device)]
        if disturbance is not None:
            shown = torch.cat([shown, disturbance(shown)])
        optimizer.zero_grad()
        if at_a_time is None:
            at_a_time = images_at_once(partial(_distance, network, shown), shown)
        for part in shown.split(at_a_time):
            loss = _distance(network, part) / len(shown)
            if not torch.isfinite(loss):
                raise DivergedError(f"loss is {loss.item()} at step {step}")
            loss.backward()
        optimizer.step()
        falling.step()
        for held, _ in network.weights.values():
            held.clip()


def _distance(network: Network, pixels: Tensor, part: slice = slice(None)) -> Tensor:
    """How far the answers to these images are from the float model's, summed."""
    with torch.no_grad():
        wanted = network.reference(pixels[part]).log_softmax(1)
    got = network.quantized(network.parameters(), pixels[part]).log_softmax(1)
    return F.kl_div(got, wanted, reduction="sum", log_target=True)
