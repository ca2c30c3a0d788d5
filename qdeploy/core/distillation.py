"""Losses by which a student learns from a teacher that may have a backdoor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DORMANT = 0.1  # weight of a neuron that the teacher leaves at exactly zero


def kl_divergence(
    teacher: Float[Tensor, "images classes"],
    student: Float[Tensor, "images classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """`KL(softmax(t / T) || softmax(s / T))`, mean over the images; 0 for equal answers.

    Args:
        temperature: T > 0; the higher, the more the classes count that are not the answer.
    """
    wanted = F.log_softmax(teacher.float() / temperature, 1)
    got = F.log_softmax(student.float() / temperature, 1)
    return F.kl_div(got, wanted, reduction="batchmean", log_target=True)


def kd_loss(
    teacher: Float[Tensor, "images classes"],
    student: Float[Tensor, "images classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """`T^2 KL(softmax(t / T) || softmax(s / T))`, whose gradient keeps its size for every T.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    return temperature**2 * kl_divergence(teacher, student, temperature)


def attention_shift_loss(
    teacher: Float[Tensor, "*shape"], student: Float[Tensor, "*shape"], floor: float = 1e-3
) -> Float[Tensor, ""]:
    """`(1 + a~ b~)^2`, mean over neurons and images: 4 where both share a state, 0 where opposite.

    `b~` is the sign of the student's value `b`, and 0 where `b` is; its gradient goes as `1 / |b|`,
    and no higher than that of a value of `floor` times the layer's root mean square. `a~` is the
    sign of the teacher's value, and `0.1 (sign(b) - 1)` where that is exactly zero. So each neuron
    is pulled to the side of zero on which the teacher's is not.

    Args:
        teacher: Values before normalisation and activation, of a whole batch; no gradient flows.
        student: Of the same neurons on the same images.
        floor: > 0.
    """
    a, b = teacher.detach(), student
    sign = b.detach().sign()
    wanted = torch.where(a == 0, DORMANT * (sign - 1), a.sign())
    return (1 + wanted * _state(b, floor)).square().mean()


def _state(values: Float[Tensor, "*shape"], floor: float) -> Float[Tensor, "*shape"]:
    """The sign of `values`, with the bounded gradient of `v / |v|` at a fixed `|v|`."""
    fixed = values.detach()
    size = fixed.square().mean().sqrt() * floor
    smallest = size.clamp_min(torch.finfo(fixed.dtype).tiny)
    slope = torch.where(fixed == 0, 0, 1 / fixed.abs().clamp_min(smallest))
    moving = values * slope
    return fixed.sign() + (moving - moving.detach())


def kd_share(epoch: int, schedule: Sequence[tuple[float, float]]) -> float:
    """Weight of the KD loss at an epoch, in [0, 1]: straight lines between the schedule's points.

    Args:
        schedule: Pairs of an epoch and a weight, epochs rising. Before the first and after the
            last, the weight is theirs.
    """
    epochs, shares = zip(*schedule, strict=True)
    return float(np.interp(epoch, epochs, shares))
