"""Recipes: what to do with a model, and what it must show to be accepted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from qdeploy.settings.device import AUTO
from qdeploy.settings.methods import AnyRounding, EfrapDescent
from qdeploy.settings.policy import GateSpec, Policy, ValidationSpec
from qdeploy.settings.schema import Spec, find_bundled, load_toml

WeightRange = Literal["absmax", "half", "minmax", "mse"]
Granularity = Literal["channel", "tensor"]
Bits = Literal[4, 8, "auto"]  # auto: 4, and 8 where a layer does not bear 4


class WeightGridSpec(Spec):
    """How the scale of a weight follows from its values."""

    range: WeightRange = Field(
        "absmax",
        description="absmax: the largest magnitude is the outermost code. half: it lies half a step"
        " further out, as with 127.5. minmax: asymmetric, from the smallest value to the largest."
        " mse: absmax shrunk to where the squared rounding error is least.",
    )
    per: Granularity = Field("channel", description="One scale per output channel, or one.")


class ActivationSpec(Spec):
    bits: Literal[8, "none"] = Field(8, description="none: weights only.")
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(99.99, gt=50, le=100)


class CalibrationSpec(Spec):
    images: int = Field(1024, gt=0, description="At most; drawn with the seed.")


class Override(Spec):
    """What is done otherwise with the layers whose names match a pattern."""

    layers: str = Field(description="Shell-style pattern; must match at least one layer.")
    bits: Literal[4, 8, "float"] | None = Field(
        None, description="float: these layers keep their float32 weights, and run in float."
    )
    activations: Literal["none"] | None = Field(
        None, description="none: what these layers read stays float, so they run in float."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.bits is None and self.activations is None:
            raise ValueError("an override gives bits, activations or both")
        return self


class SearchSpec(Spec):
    """How bits = "auto" looks for the smallest file."""

    min_agreement: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Percent of the calibration images with the float model's answer; else half way"
        " from the gate's limit to 100, since they are what the file is fitted to.",
    )
    images: int = Field(256, gt=0, description="Of those for calibration, at most.")


class HardeningSpec(Spec):
    """How integers are chosen again, end to end, against what a search for triggers has found."""

    when: Literal["found", "always", "never"] = Field(
        "found", description="found: if something leads more images than `above`."
    )
    above: float = Field(25.0, ge=0, le=100, description="Percent of images.")
    rounds: int = Field(3, gt=0, description="Of hardening and searching again, at most.")
    attempts: int = Field(
        3, gt=0, description="To choose, in a round, while what was found before still leads."
    )
    still: float = Field(
        3.0, ge=0, le=100, description="Percent of images that it may lead before that is tried."
    )
    steps: int = Field(250, gt=0)
    images: int = Field(24, gt=0, description="Plain ones of a step, and as many perturbed.")
    learning_rate: float = Field(0.02, gt=0, description="Of choices.")
    bias_rate: float = Field(1e-4, ge=0)


class Recipe(Spec):
    """What is done to a model, and what the result must show."""

    schema_version: Literal[1]
    name: str
    description: str
    bits: Bits
    seed: int = Field(0, ge=0)
    device: str = AUTO
    rounding: AnyRounding = EfrapDescent()
    weights: WeightGridSpec = WeightGridSpec()
    activations: ActivationSpec = ActivationSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    validation: ValidationSpec = ValidationSpec()
    gate: GateSpec = GateSpec()
    search: SearchSpec = SearchSpec()
    optimize: Literal["size", "latency"] = Field(
        "size",
        description="latency: layers that integers make slower on this machine are left in float.",
    )
    hardening: HardeningSpec = HardeningSpec()
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="after")
    def _one_word_on_hardening(self) -> Recipe:
        if self.rounding.hardened and self.hardening.when == "never":
            raise ValueError(f'hardening.when is "never", and {self.rounding.name} hardens')
        return self

    def with_decided(self, found: Iterable[Override]) -> Recipe:
        """With overrides that were measured; its own come after them and have the last word."""
        return self.model_copy(update={"overrides": (*found, *self.overrides)})

    @property
    def hardens(self) -> bool:
        """Whether integers are chosen end to end in any case."""
        return self.rounding.hardened or self.hardening.when == "always"

    def policy(self) -> Policy:
        """The part of the recipe that says what must be shown."""
        return Policy(
            schema_version=1,
            name=self.name,
            description=self.description,
            device=self.device,
            seed=self.seed,
            validation=self.validation,
            gate=self.gate,
        )


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of that name, or in that file.

    Raises:
        UsageError: there is no such recipe.
        InputError: the file does not fit the format.
    """
    return load_toml(find_bundled("recipes", name_or_path), Recipe, what="recipe")
