"""Recipes: what to do with a model, and what it must show to be accepted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qdeploy.settings.device import AUTO
from qdeploy.settings.methods import AnyRounding, EfrapDescent
from qdeploy.settings.policy import GateSpec, Policy, ValidationSpec
from qdeploy.settings.schema import Spec, find_bundled, load_toml

WeightRange = Literal["absmax", "half", "minmax", "mse"]
Granularity = Literal["channel", "tensor"]


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
    """A different bit width for the layers whose names match a pattern."""

    layers: str = Field(description="Shell-style pattern; must match at least one layer.")
    bits: Literal[4, 8]


class Recipe(Spec):
    """What is done to a model, and what the result must show."""

    schema_version: Literal[1]
    name: str
    description: str
    bits: Literal[4, 8]
    seed: int = Field(0, ge=0)
    device: str = AUTO
    rounding: AnyRounding = EfrapDescent()
    weights: WeightGridSpec = WeightGridSpec()
    activations: ActivationSpec = ActivationSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    validation: ValidationSpec = ValidationSpec()
    gate: GateSpec = GateSpec()
    overrides: tuple[Override, ...] = ()

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
