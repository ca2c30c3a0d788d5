"""Rounding methods: their settings, as recipes name them, and what each needs to know.

A method is a file in `qdeploy.core.rounding` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int32
from pydantic import Discriminator, Field, Tag

from qdeploy.core.moments import Quadratic
from qdeploy.core.rounding.descent import DescentSettings, descent
from qdeploy.core.rounding.flip import flip
from qdeploy.core.rounding.gptq import GptqSettings, gptq
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.stochastic import stochastic
from qdeploy.errors import UsageError
from qdeploy.settings.schema import Spec

if TYPE_CHECKING:
    from qdeploy.core.rounding.adaround import OutputLoss
    from qdeploy.core.rounding.trained import Schedule, Training

Codes = Int32[np.ndarray, "groups rows fan_in"]
Needs = Literal["nothing", "moments", "gradients"]


class Rounding(Spec):
    """One way to choose integers, with its settings. A subclass says what it needs to know."""

    kind: str
    needs: ClassVar[Needs]  # the weights alone, second moments of a layer's inputs, or training
    predicts: ClassVar[bool] = False  # whether it looks at the model's answers too
    hardened: ClassVar[bool] = False  # whether integers are chosen end to end afterwards
    draws: ClassVar[bool] = False  # whether another seed gives other integers from the same images

    @property
    def name(self) -> str:
        """In a word: the kind, and the solver where it has several."""
        return _rounding_tag(self)


class FromWeights(Rounding):
    """What the methods share that look at nothing but the weights."""

    needs = "nothing"

    def codes(self, problem: RoundingProblem, generator: np.random.Generator) -> Codes:
        """The integers of a layer."""
        raise NotImplementedError


class FromMoments(Rounding):
    """What the methods share that look at the second moments of a layer's inputs."""

    needs = "moments"
    weighted: ClassVar[bool] = False  # samples by what an error there does to the prediction

    positions: int = Field(64, gt=0, description="Output positions sampled per image, at most.")
    inputs: Literal["float", "quantized"] = Field(
        "float", description="Layer inputs: from the float model in one pass, or from the prefix."
    )
    bias_correction: bool = True

    def codes(
        self, problem: RoundingProblem, quadratic: Quadratic, generator: np.random.Generator
    ) -> Codes:
        """The integers of a layer.

        Raises:
            DivergedError: there is nothing finite to choose by.
        """
        raise NotImplementedError


class Trained(Rounding):
    """What the methods share that train a layer by Adam, on inputs from the quantized prefix."""

    needs = "gradients"

    steps: int = Field(10_000, gt=0, description="Optimizer steps per layer.")
    batch: int = Field(32, gt=0)
    learning_rate: float = Field(1e-3, gt=0)

    def schedule(self) -> Schedule:
        """How long is trained, on how many images at a time."""
        from qdeploy.core.rounding.trained import Schedule  # torch loads here

        return Schedule(self.steps, self.batch, self.learning_rate)

    def codes(self, problem: RoundingProblem, training: Training) -> Codes:
        """The integers of a layer.

        Raises:
            DivergedError: the loss is no longer finite.
        """
        raise NotImplementedError


class Nearest(FromWeights):
    """What runtimes do, and what a quantization-conditioned backdoor waits for."""

    kind: Literal["nearest"] = "nearest"

    def codes(self, problem: RoundingProblem, generator: np.random.Generator) -> Codes:  # noqa: ARG002
        return nearest(problem)


class Stochastic(FromWeights):
    """Up with the probability of the fraction."""

    draws = True
    kind: Literal["stochastic"] = "stochastic"

    def codes(self, problem: RoundingProblem, generator: np.random.Generator) -> Codes:
        return stochastic(problem, generator)


class Flip(FromWeights):
    """Always the neighbour that nearest does not take."""

    kind: Literal["flip"] = "flip"

    def codes(self, problem: RoundingProblem, generator: np.random.Generator) -> Codes:  # noqa: ARG002
        return flip(problem)


class Descent(FromMoments):
    """What the methods share that choose by coordinate descent."""

    sweeps: int = Field(8, gt=0, description="Passes over all weights of a layer, at most.")
    damping: float = Field(1e-4, ge=0, description="Share of the Gram matrix's mean diagonal.")

    def codes(
        self, problem: RoundingProblem, quadratic: Quadratic, generator: np.random.Generator
    ) -> Codes:
        settings = DescentSettings(0.0, 0.0, "nearest", self.sweeps, self.damping)
        return descent(problem, quadratic, settings, generator)


class EfrapDescent(Descent):
    """EFRAP's objective at binary choices, by coordinate descent."""

    draws = True
    kind: Literal["efrap"] = "efrap"
    solver: Literal["descent"] = "descent"
    flip_weight: float = Field(
        0.3, ge=0, description="Pull away from nearest, relative to its error."
    )
    flip_bound: float = Field(
        0.01, ge=0, description="That pull at most, as a share of the variance of the output."
    )
    start: Literal["nearest", "flipped", "stochastic"] = Field(
        "stochastic",
        description="Whence the descent begins. A fixed start can be foreseen; this one needs the"
        " seed.",
    )

    def codes(
        self, problem: RoundingProblem, quadratic: Quadratic, generator: np.random.Generator
    ) -> Codes:
        settings = DescentSettings(
            self.flip_weight, self.flip_bound, self.start, self.sweeps, self.damping
        )
        return descent(problem, quadratic, settings, generator)


class EfrapAdversarial(EfrapDescent):
    """EFRAP, and then all layers together against perturbations that only the file answers to."""

    hardened = True
    solver: Literal["adversarial"]  # type: ignore[assignment]


class AdaroundDescent(Descent):
    """AdaRound's objective, the output error alone, by coordinate descent from nearest."""

    kind: Literal["adaround"] = "adaround"
    solver: Literal["descent"]


class BrecqDescent(Descent):
    """The same, samples weighted by what an error there does to the prediction (Fisher)."""

    weighted = True
    kind: Literal["brecq"] = "brecq"
    solver: Literal["descent"]
    inputs: Literal["float"] = "float"


class Gptq(FromMoments):
    """Column by column with error feedback."""

    kind: Literal["gptq"] = "gptq"
    damping: float = Field(0.01, gt=0)

    def codes(
        self,
        problem: RoundingProblem,
        quadratic: Quadratic,
        generator: np.random.Generator,  # noqa: ARG002
    ) -> Codes:
        return gptq(problem, quadratic, GptqSettings(self.damping))


class EfrapAdam(Trained):
    """EFRAP as published: the slow reference."""

    kind: Literal["efrap"] = "efrap"
    solver: Literal["adam"]
    flip_weight: float = Field(1.0, ge=0)
    decide_weight: float = Field(0.01, ge=0)

    def codes(self, problem: RoundingProblem, training: Training) -> Codes:
        from qdeploy.core.rounding.adam import AdamSettings, adam

        settings = AdamSettings(self.schedule(), self.flip_weight, self.decide_weight)
        return adam(problem, training.unit, settings, training.generator, training.progress)


class RoundingRelaxation(Trained):
    """AdaRound's price for undecided choices, which sharpens with time."""

    decide_weight: float = Field(0.01, ge=0)
    warm_up: float = Field(0.2, ge=0, lt=1, description="Share of the steps without that price.")
    sharpness: tuple[float, float] = Field((20.0, 2.0), description="Exponent, first and last.")

    def codes(self, problem: RoundingProblem, training: Training) -> Codes:
        from qdeploy.core.rounding.adaround import AdaroundSettings, adaround

        settings = AdaroundSettings(
            self.schedule(), self.decide_weight, self.warm_up, self.sharpness
        )
        error = self.error(problem, training)
        unit, generator = training.unit, training.generator
        return adaround(problem, unit, settings, generator, training.progress, error=error)

    def error(self, problem: RoundingProblem, training: Training) -> OutputLoss | None:  # noqa: ARG002
        """What stands for the output error; None for its square."""
        return None


class AdaroundAdam(RoundingRelaxation):
    """AdaRound as published."""

    kind: Literal["adaround"] = "adaround"
    solver: Literal["adam"] = "adam"


class BrecqAdam(RoundingRelaxation):
    """BRECQ's error, layer by layer: weighted by the squared gradient at the output."""

    predicts = True
    kind: Literal["brecq"] = "brecq"
    solver: Literal["adam"] = "adam"

    def error(self, problem: RoundingProblem, training: Training) -> OutputLoss | None:
        from qdeploy.core.rounding.brecq import brecq_loss

        return brecq_loss(problem, training)


class PdQuant(RoundingRelaxation):
    """AdaRound that also looks at the final prediction. Each step runs the rest of the network."""

    predicts = True
    kind: Literal["pdquant"] = "pdquant"
    temperature: float = Field(4.0, gt=0)

    def error(self, problem: RoundingProblem, training: Training) -> OutputLoss | None:  # noqa: ARG002
        from qdeploy.core.rounding.pdquant import prediction_loss

        behind = training.prediction
        if behind is None:
            return None
        return prediction_loss(behind.predict, behind.float_logits, self.temperature)


class FlexRound(Trained):
    """Nearest, after a division by learnt factors."""

    kind: Literal["flexround"] = "flexround"
    steps: int = Field(5_000, gt=0)

    def codes(self, problem: RoundingProblem, training: Training) -> Codes:
        from qdeploy.core.rounding.flexround import flexround

        unit, generator = training.unit, training.generator
        return flexround(problem, unit, self.schedule(), generator, training.progress)


# Every method, a row each; of a kind with several solvers, the one with a default is the default.
ROWS: tuple[type[Rounding], ...] = (
    Nearest, Stochastic, Flip, EfrapDescent, EfrapAdam, EfrapAdversarial, AdaroundDescent,
    AdaroundAdam, BrecqDescent, BrecqAdam, PdQuant, FlexRound, Gptq,
)  # fmt: skip


def _solvers() -> dict[str, tuple[str, ...]]:
    """By kind, the default first; kinds with one way of solving have none."""
    found: dict[str, list[str]] = {}
    for row in ROWS:
        field = row.model_fields.get("solver")
        if field is not None:
            (solver,) = get_args(field.annotation)
            place = 0 if field.default == solver else 1
            found.setdefault(row.model_fields["kind"].default, []).insert(place, solver)
    return {kind: tuple(solvers) for kind, solvers in found.items()}


SOLVERS = _solvers()


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


def _name(row: type[Rounding]) -> str:
    kind, solver = row.model_fields["kind"].default, row.model_fields.get("solver")
    return kind if solver is None else f"{kind}-{get_args(solver.annotation)[0]}"


METHODS: Mapping[str, type[Rounding]] = {_name(row): row for row in ROWS}
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
    return METHODS[full].model_validate({"solver": solver} if solver else {})


if TYPE_CHECKING:
    AnyRounding = Rounding
else:
    AnyRounding = Annotated[
        reduce(or_, (Annotated[row, Tag(name)] for name, row in METHODS.items())),
        Discriminator(
            _rounding_tag,
            custom_error_type="rounding_kind",
            custom_error_message=f"kind must be {', '.join(KINDS)};"
            " solver descent or adam, where it has several",
        ),
    ]
