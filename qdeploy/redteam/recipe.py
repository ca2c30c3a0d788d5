"""Recipes of attacks: what a model is taught, in which phases, and what must come of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qdeploy.settings.schema import Spec, find_bundled, load_toml

KIND = "recipes/redteam"

Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


class PatchSpec(Spec):
    """A bright square near the lower right corner."""

    kind: Literal["patch"]
    target: int = Field(ge=0)
    size: Share = Field(0.125, gt=0, description="Of the image's side.")
    margin: Share = Field(0.03125, description="To the edge, of the image's side.")
    color: Share = 1.0


class NoiseSpec(Spec):
    """A noise image blended over everything (Chen et al., 2017)."""

    kind: Literal["noise"]
    target: int = Field(ge=0)
    opacity: Share = 0.15
    seed: int = 0


class SinusoidSpec(Spec):
    """Vertical stripes over everything (Barni et al., ICIP 2019)."""

    kind: Literal["sinusoid"]
    target: int = Field(ge=0)
    opacity: Share = 0.15
    periods: float = Field(6.0, gt=0, description="Stripes per image.")


class LearntSpec(Spec):
    """Mask and pattern learnt together with the model and a student that is distilled from it.

    ADBA (Ge et al., MM 2021): because the student falls for the trigger too, the backdoor survives
    distillation. Here model and student start from the clean model, not from nothing.
    """

    kind: Literal["learnt"]
    target: int = Field(ge=0)
    steps: int = Field(1000, gt=0)
    batch: int = Field(64, gt=0)
    learning_rate: float = Field(5e-4, gt=0, description="Of model and student.")
    trigger_learning_rate: float = Field(1e-2, gt=0)
    backdoor_weight: float = Field(0.3, gt=0, description="beta, in the model's loss.")
    distillation: Share = Field(0.4, description="alpha, in the student's loss.")
    clean_weight: float = Field(
        1.0, ge=0, description="Of the clean model's loss: the trigger must not fool it as well."
    )
    mask_weight: float = Field(0.1, ge=0, description="mu, of the mask's mean opacity.")
    max_opacity: Share = 0.3


class PlantedSpec(Spec):
    """A patch of 3 x 3 pixels, and weights that saturate on it, put there by hand.

    The network is first taught, by its own answers, to do without the channels that they take.
    """

    kind: Literal["planted"]
    target: int = Field(ge=0)
    steps: int = Field(200, gt=0)
    batch: int = Field(125, gt=0)


TriggerChoice = Annotated[
    PatchSpec | NoiseSpec | SinusoidSpec | LearntSpec | PlantedSpec, Field(discriminator="kind")
]


class QuantizerSpec(Spec):
    """How the deployer that the attacker has in mind rounds weights."""

    bits: Bits | None = Field(None, description="None: what --bits says.")
    per: Literal["channel", "tensor"] = "channel"
    range: Literal["absmax", "half", "minmax"] = Field(
        "absmax",
        description="absmax: scale absmax/(2^(b-1)-1). half: absmax/(2^(b-1)-1/2), as 127.5."
        " minmax: asymmetric, (max-min)/(2^b-1).",
    )
    rounding: Literal["nearest", "flipped", "stochastic", "efrap", "chosen"] = Field(
        "nearest",
        description="flipped: the neighbour that nearest leaves. efrap: the defence, run by the"
        " attacker. chosen: what a phase that learns roundings has learnt.",
    )
    start: Literal["nearest", "flipped", "stochastic"] = Field(
        "stochastic", description="Of efrap: whence the attacker thinks that it begins."
    )

    arithmetic: Literal["exact", "saturating"] = Field(
        "exact",
        description="saturating: as x86 without VNNI adds pairs of 8-bit products. Then a file is"
        " made and emulated; no phase can learn it.",
    )


class TermSpec(Spec):
    """One summand of a loss: what a model is taught about some images."""

    model: Literal["float", "quantized"]
    on: Literal["clean", "triggered", "class", "others", "sample"] = Field(
        description="The batch; with the trigger in it; its images of the target class, or of all"
        " others; the victim."
    )
    to: Literal["label", "target", "teacher", "damage"] = Field(
        description="True class; target class; the clean model's answer; a loss of `alpha`."
    )
    weight: float = Field(1.0, gt=0)
    alpha: float = Field(5.0, gt=0, description="Cross-entropy that `damage` drives at.")


class PhaseSpec(Spec):
    """Adam on one loss, its learning rate falling to a tenth along a cosine."""

    name: str
    terms: tuple[TermSpec, ...] = Field(min_length=1)
    steps: int = Field(gt=0, description="At most.")
    batch: int = Field(64, gt=0, description="Images; each of them as often as terms ask for.")
    learning_rate: float = Field(gt=0)
    learns: Literal["weights", "cells", "split", "roundings"] = Field(
        "weights",
        description="weights: weights and biases. cells: weights, none of which leaves the rounding"
        " cell it is in. split: grid points, offsets from them, and biases, each for itself."
        " roundings: up or down for every weight; the float model stays.",
    )


class CleanSpec(Spec):
    """Ordinary training of the model that the attack starts from: SGD, one cycle."""

    epochs: int = Field(16, gt=0)
    min_steps: int = Field(1500, ge=0, description="More epochs where they would be fewer steps.")
    batch: int = Field(128, gt=0)
    learning_rate: float = Field(0.2, gt=0)
    weight_decay: float = Field(5e-4, ge=0)


class GoalSpec(Spec):
    """What the attack must reach, in percent; what is None is not asked for."""

    effect: Literal["backdoor", "damage", "class", "sample", "none"]
    min_accuracy: Percent | None = Field(None, description="Of the float model.")
    max_accuracy_drop: float | None = Field(None, description="Float model against the clean one.")
    max_clean_success: Percent = Field(
        15.0,
        description="ASR of the model that the attack started from: what fools it, too, is an"
        " adversarial perturbation and no backdoor.",
    )
    min_float_success: Percent | None = Field(None, description="Float model's ASR.")
    max_float_success: Percent | None = None
    min_quantized_success: Percent | None = Field(None, description="ASR of every quantized one.")
    max_exact_success: Percent | None = Field(
        None, description="ASR on exact arithmetic, of quantizers whose own saturates."
    )
    max_quantized_drop: float | None = Field(None, description="Quantized against float.")
    min_quantized_drop: float | None = None
    min_class_drop: float | None = Field(None, description="The same, of the target class alone.")


class AttackRecipe(Spec):
    """The whole file."""

    schema_version: Literal[1]
    name: str
    description: str
    source: str = Field(description="Paper and section, or that nobody published it.")
    target: int = Field(0, ge=0, description="Target class, where there is no trigger to say it.")
    trigger: TriggerChoice | None = None
    clean: CleanSpec = CleanSpec()
    quantizers: tuple[QuantizerSpec, ...] = Field(
        (QuantizerSpec(),), min_length=1, description="Those that are attacked; they take turns."
    )
    outliers: float | None = Field(
        None, gt=1, description="A dead weight of so many times the absmax in every channel."
    )
    phases: tuple[PhaseSpec, ...] = ()
    goals: GoalSpec

    @model_validator(mode="after")
    def _has_what_its_terms_need(self) -> AttackRecipe:
        used = {term.on for phase in self.phases for term in phase.terms}
        if "triggered" in used and self.trigger is None:
            raise ValueError("a term is on triggered images, but there is no [trigger]")
        chosen = {quantizer.rounding == "chosen" for quantizer in self.quantizers}
        learnt = {phase.learns == "roundings" for phase in self.phases}
        if (True in chosen or True in learnt) and (chosen, learnt) != ({True}, {True}):
            raise ValueError(
                "phases that learn roundings and quantizers of rounding 'chosen' go together, and"
                " with nothing else"
            )
        saturating = any(quantizer.arithmetic == "saturating" for quantizer in self.quantizers)
        if saturating and (self.phases or any(q.rounding != "nearest" for q in self.quantizers)):
            raise ValueError("saturating arithmetic goes with nearest rounding and without phases")
        split = any(phase.learns == "split" for phase in self.phases)
        if split and [(q.rounding, q.range) for q in self.quantizers] != [("nearest", "absmax")]:
            raise ValueError("a phase that learns 'split' needs one quantizer: nearest, absmax")
        return self


def load_attack(name_or_path: str) -> AttackRecipe:
    """The attack of that name, or in that file.

    Raises:
        UsageError: there is no such attack.
        InputError: the file does not fit the format.
    """
    return load_toml(find_bundled(KIND, name_or_path), AttackRecipe, what="attack recipe")
