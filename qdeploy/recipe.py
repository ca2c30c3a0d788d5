"""Recipes: what to do with a model, and what it must show to be accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_serializer

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
    "file_bytes",
    "latency_ms",
]


class Nearest(Spec):
    """What runtimes do, and what a quantization-conditioned backdoor waits for."""

    kind: Literal["nearest"] = "nearest"


class Stochastic(Spec):
    """Up with the probability of the fraction."""

    kind: Literal["stochastic"] = "stochastic"


class EfrapDescent(Spec):
    """EFRAP's objective at binary choices, by coordinate descent."""

    kind: Literal["efrap"] = "efrap"
    solver: Literal["descent"] = "descent"
    flip_weight: float = Field(
        0.3, ge=0, description="Pull away from nearest, relative to its error."
    )
    start: Literal["nearest", "flipped", "stochastic"] = Field(
        "stochastic",
        description="Whence the descent begins. A fixed start can be foreseen; this one needs the"
        " seed.",
    )
    sweeps: int = Field(20, gt=0, description="Passes over all weights of a layer, at most.")
    damping: float = Field(1e-4, ge=0, description="Share of the Gram matrix's mean diagonal.")
    positions: int = Field(64, gt=0, description="Output positions sampled per image, at most.")
    inputs: Literal["float", "quantized"] = Field(
        "float", description="Layer inputs: from the float model in one pass, or from the prefix."
    )
    bias_correction: bool = True


class EfrapAdam(Spec):
    """EFRAP as published: the slow reference."""

    kind: Literal["efrap"] = "efrap"
    solver: Literal["adam"]
    steps: int = Field(10_000, gt=0, description="Optimizer steps per layer.")
    batch: int = Field(32, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    flip_weight: float = Field(1.0, ge=0)
    decide_weight: float = Field(0.01, ge=0)


def _rounding_tag(value: Any) -> str:
    """`nearest`, `stochastic`, `efrap` (whose solver is descent unless named) or `efrap-adam`."""
    if isinstance(value, Spec):
        value = value.model_dump()
    if not isinstance(value, dict):
        return "not a table"
    kind = str(value.get("kind"))
    return "efrap-adam" if kind == "efrap" and value.get("solver") == "adam" else kind


Rounding = Annotated[
    Annotated[Nearest, Tag("nearest")]
    | Annotated[Stochastic, Tag("stochastic")]
    | Annotated[EfrapDescent, Tag("efrap")]
    | Annotated[EfrapAdam, Tag("efrap-adam")],
    Discriminator(
        _rounding_tag,
        custom_error_type="rounding_kind",
        custom_error_message="kind must be nearest, stochastic or efrap",
    ),
]


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
    rounding: Rounding = EfrapDescent()
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
