"""Rounding methods and their settings, as recipes name them. What they do is in `qdeploy.core`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from qdeploy.errors import UsageError
from qdeploy.settings.schema import Spec


class Nearest(Spec):
    """What runtimes do, and what a quantization-conditioned backdoor waits for."""

    kind: Literal["nearest"] = "nearest"


class Stochastic(Spec):
    """Up with the probability of the fraction."""

    kind: Literal["stochastic"] = "stochastic"


class Flip(Spec):
    """Always the neighbour that nearest does not take."""

    kind: Literal["flip"] = "flip"


class FromMoments(Spec):
    """What the methods share that look at the second moments of a layer's inputs."""

    positions: int = Field(64, gt=0, description="Output positions sampled per image, at most.")
    inputs: Literal["float", "quantized"] = Field(
        "float", description="Layer inputs: from the float model in one pass, or from the prefix."
    )
    bias_correction: bool = True


class EfrapDescent(FromMoments):
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
    sweeps: int = Field(8, gt=0, description="Passes over all weights of a layer, at most.")
    damping: float = Field(1e-4, ge=0, description="Share of the Gram matrix's mean diagonal.")


class AdaroundDescent(FromMoments):
    """AdaRound's objective, the output error alone, by coordinate descent from nearest."""

    kind: Literal["adaround"] = "adaround"
    solver: Literal["descent"]
    sweeps: int = Field(8, gt=0)
    damping: float = Field(1e-4, ge=0)


class BrecqDescent(FromMoments):
    """The same, samples weighted by what an error there does to the prediction (Fisher)."""

    kind: Literal["brecq"] = "brecq"
    solver: Literal["descent"]
    inputs: Literal["float"] = "float"
    sweeps: int = Field(8, gt=0)
    damping: float = Field(1e-4, ge=0)


class Gptq(FromMoments):
    """Column by column with error feedback."""

    kind: Literal["gptq"] = "gptq"
    damping: float = Field(0.01, gt=0)


class Trained(Spec):
    """What the methods share that train a layer by Adam, on inputs from the quantized prefix."""

    steps: int = Field(10_000, gt=0, description="Optimizer steps per layer.")
    batch: int = Field(32, gt=0)
    learning_rate: float = Field(1e-3, gt=0)


class EfrapAdam(Trained):
    """EFRAP as published: the slow reference."""

    kind: Literal["efrap"] = "efrap"
    solver: Literal["adam"]
    flip_weight: float = Field(1.0, ge=0)
    decide_weight: float = Field(0.01, ge=0)


class RoundingRelaxation(Trained):
    """AdaRound's price for undecided choices, which sharpens with time."""

    decide_weight: float = Field(0.01, ge=0)
    warm_up: float = Field(0.2, ge=0, lt=1, description="Share of the steps without that price.")
    sharpness: tuple[float, float] = Field((20.0, 2.0), description="Exponent, first and last.")


class AdaroundAdam(RoundingRelaxation):
    """AdaRound as published."""

    kind: Literal["adaround"] = "adaround"
    solver: Literal["adam"] = "adam"


class BrecqAdam(RoundingRelaxation):
    """BRECQ's error, layer by layer: weighted by the squared gradient at the output."""

    kind: Literal["brecq"] = "brecq"
    solver: Literal["adam"] = "adam"


class PdQuant(RoundingRelaxation):
    """AdaRound that also looks at the final prediction. Each step runs the rest of the network."""

    kind: Literal["pdquant"] = "pdquant"
    temperature: float = Field(4.0, gt=0)


class FlexRound(Trained):
    """Nearest, after a division by learnt factors."""

    kind: Literal["flexround"] = "flexround"
    steps: int = Field(5_000, gt=0)


Rounding = (
    Nearest
    | Stochastic
    | Flip
    | EfrapDescent
    | EfrapAdam
    | AdaroundDescent
    | AdaroundAdam
    | BrecqDescent
    | BrecqAdam
    | PdQuant
    | FlexRound
    | Gptq
)
SOLVERS = {  # the first is the default
    "efrap": ("descent", "adam"),
    "adaround": ("adam", "descent"),
    "brecq": ("adam", "descent"),
}


def _rounding_tag(value: Any) -> str:
    """The kind, with its solver where it has several."""
    if isinstance(value, Spec):
        value = value.model_dump()
    if not isinstance(value, dict):
        return "not a table"
    kind = str(value.get("kind"))
    if kind not in SOLVERS:
        return kind
    return f"{kind}-{value.get('solver', SOLVERS[kind][0])}"


def method_name(spec: Rounding) -> str:
    """The method in a word: its kind, and its solver where it has several."""
    return _rounding_tag(spec)


METHODS: Mapping[str, type[Spec]] = {
    "nearest": Nearest,
    "stochastic": Stochastic,
    "flip": Flip,
    "efrap-descent": EfrapDescent,
    "efrap-adam": EfrapAdam,
    "adaround-descent": AdaroundDescent,
    "adaround-adam": AdaroundAdam,
    "brecq-descent": BrecqDescent,
    "brecq-adam": BrecqAdam,
    "pdquant": PdQuant,
    "flexround": FlexRound,
    "gptq": Gptq,
}
KINDS = tuple(dict.fromkeys(name.split("-")[0] for name in METHODS))


def full_name(name: str) -> str:
    """The name with its solver; without one, the first that the method has."""
    return f"{name}-{SOLVERS[name][0]}" if name in SOLVERS else name


def method(name: str) -> Rounding:
    """The method of that name with its defaults; without a solver, by the first it has.

    Raises:
        UsageError: there is no such method.
    """
    full = full_name(name)
    if full not in METHODS:
        raise UsageError(f"there is no rounding method {name!r}", hint=f"have {', '.join(METHODS)}")
    solver = full.partition("-")[2]
    made: Rounding = METHODS[full].model_validate({"solver": solver} if solver else {})  # type: ignore[assignment]
    return made


AnyRounding = Annotated[
    Annotated[Nearest, Tag("nearest")]
    | Annotated[Stochastic, Tag("stochastic")]
    | Annotated[Flip, Tag("flip")]
    | Annotated[EfrapDescent, Tag("efrap-descent")]
    | Annotated[EfrapAdam, Tag("efrap-adam")]
    | Annotated[AdaroundDescent, Tag("adaround-descent")]
    | Annotated[AdaroundAdam, Tag("adaround-adam")]
    | Annotated[BrecqDescent, Tag("brecq-descent")]
    | Annotated[BrecqAdam, Tag("brecq-adam")]
    | Annotated[PdQuant, Tag("pdquant")]
    | Annotated[FlexRound, Tag("flexround")]
    | Annotated[Gptq, Tag("gptq")],
    Discriminator(
        _rounding_tag,
        custom_error_type="rounding_kind",
        custom_error_message=f"kind must be {', '.join(KINDS)};"
        " solver descent or adam, where it has several",
    ),
]
