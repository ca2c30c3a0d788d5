"""Recipes: what to do with a model, and what it must show to be accepted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_serializer

from qdeploy.methods import AnyRounding, EfrapDescent
from qdeploy.schema import Spec, find_bundled, load_toml

CheckName = Literal[
    "accuracy_drop",
    "class_drop",
    "agreement",
    "attack_success",
    "attack_success_rise",
    "runtime_agreement",
    "layers_as_planned",
    "codes_as_chosen",
    "cell_crowding",
    "file_bytes",
    "latency_ms",
]


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


class ValidationSpec(Spec):
    images: int | None = Field(None, gt=0, description="At most; none for all.")
    latency_runs: int = Field(10, ge=0, description="Timed runs per turn; 0 for none.")


class GateSpec(Spec):
    """Limits, and the checks without which there is no verdict. Percent and percentage points."""

    required: frozenset[CheckName] = frozenset(
        {"accuracy_drop", "agreement", "runtime_agreement", "layers_as_planned", "codes_as_chosen"}
    )
    required_with_trigger: frozenset[CheckName] = frozenset(
        {"attack_success", "attack_success_rise"}
    )
    max_accuracy_drop: float = 1.0
    max_class_drop: float | None = Field(None, description="Largest drop of one class's accuracy.")
    min_agreement: float = 90.0
    max_attack_success: float = 10.0
    max_attack_success_rise: float = 1.0
    min_runtime_agreement: float = 99.0
    max_cell_crowding: float | None = Field(
        None, description="Score of the float weights at cell edges; clean models stay below 5."
    )
    min_images: int = Field(200, gt=0, description="A rate over fewer images is no evidence.")
    min_class_images: int = Field(50, gt=0, description="The same for the rate of one class.")
    allow_float: tuple[str, ...] = Field((), description="Layers that may stay float (patterns).")
    allow_degraded: tuple[str, ...] = Field((), description="Layers that may lose their method.")

    @field_serializer("required", "required_with_trigger")
    def _sorted(self, names: frozenset[str]) -> list[str]:
        """In an order that does not change from run to run."""
        return sorted(names)


class Override(Spec):
    """A different bit width for the layers whose names match a pattern."""

    layers: str = Field(description="Shell-style pattern; must match at least one layer.")
    bits: Literal[4, 8]


class Recipe(Spec):
    schema_version: Literal[1]
    name: str
    description: str
    bits: Literal[4, 8]
    seed: int = Field(0, ge=0)
    device: str = "x86-vnni"
    rounding: AnyRounding = EfrapDescent()
    weights: WeightGridSpec = WeightGridSpec()
    activations: ActivationSpec = ActivationSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    validation: ValidationSpec = ValidationSpec()
    gate: GateSpec = GateSpec()
    overrides: tuple[Override, ...] = ()


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of that name, or in that file.

    Raises:
        UsageError: there is no such recipe.
        InputError: the file does not fit the format.
    """
    return load_toml(find_bundled("recipes", name_or_path), Recipe, what="recipe")
