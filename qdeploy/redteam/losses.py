"""A phase's loss: terms about the float model and about the quantized one, summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from qdeploy.redteam.images import LabelledImages, Stamp
from qdeploy.redteam.recipe import PhaseSpec, TermSpec


@dataclass(frozen=True, slots=True, eq=False)
class Victim:
    """The one image that is to be misclassified, as pixels in [0, 1]."""

    pixels: Float[Tensor, "1 channels height width"]
    label: int


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What the attack is after."""

    target: int
    stamp: Stamp | None = None
    victim: Victim | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The images of one step as the model takes them, by the name that terms call them."""

    inputs: Mapping[str, Float[Tensor, "n channels height width"]]  # clean, triggered, sample
    labels: Int64[Tensor, " n"]
    aim: Aim

    @classmethod
    def of(
        cls,
        data: LabelledImages,
        pixels: Float[Tensor, "n channels height width"],
        labels: Int64[Tensor, " n"],
        aim: Aim,
    ) -> Batch:
        inputs = {"clean": data.normalise(pixels)}
        if aim.stamp is not None:
            inputs["triggered"] = data.normalise(aim.stamp.apply(pixels))
        if aim.victim is not None:
            inputs["sample"] = data.normalise(aim.victim.pixels)
        return cls(inputs, labels, aim)

    def labels_of(self, source: str) -> Int64[Tensor, " m"]:
        """True classes of the images called `source`."""
        if source == "sample" and self.aim.victim is not None:
            return torch.tensor([self.aim.victim.label])
        return self.labels


def phase_loss(
    phase: PhaseSpec,
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Tensor]],
    teacher: nn.Module,
    batch: Batch,
) -> Float[Tensor, ""]:
    """The sum of the phase's terms.

    Args:
        weights: In the place of the model's own, by their name: for "quantized" terms, through
            which gradients reach the weights, and for "float" ones where those are not its own.
        teacher: The clean model.
    """
    total = torch.zeros(())
    for view in ("float", "quantized"):
        terms = [term for term in phase.terms if term.model == view]
        sources = sorted({_source(term) for term in terms})
        if not sources:
            continue
        inputs = torch.cat([batch.inputs[name] for name in sources])
        logits = functional_call(model, dict(weights.get(view, {})), (inputs,))
        sizes = [len(batch.inputs[name]) for name in sources]
        answers = dict(zip(sources, logits.split(sizes), strict=True))
        for term in terms:
            total = total + term.weight * _term_loss(term, answers[_source(term)], batch, teacher)
    return total


def _source(term: TermSpec) -> str:
    """The images that a term needs an answer to: it may look at some of them only."""
    return "clean" if term.on in {"class", "others"} else term.on


def _term_loss(term: TermSpec, logits: Tensor, batch: Batch, teacher: nn.Module) -> Tensor:
    labels = batch.labels_of(term.on)
    if term.to == "teacher":
        with torch.no_grad():
            taught = teacher(batch.inputs[_source(term)]).softmax(1)
        return F.cross_entropy(logits, taught)
    if term.to == "target":
        return F.cross_entropy(logits, torch.full_like(labels, batch.aim.target))
    if term.on in {"class", "others"}:
        chosen = (labels == batch.aim.target) == (term.on == "class")
        if not chosen.any():
            return torch.zeros(())
        logits, labels = logits[chosen], labels[chosen]
    loss = F.cross_entropy(logits, labels)
    return (loss - term.alpha).square() if term.to == "damage" else loss
