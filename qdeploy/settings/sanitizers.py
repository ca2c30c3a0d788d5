"""Ways to clean a float model, and their settings. What they do is in `qdeploy.cleaning.distil`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qdeploy.settings.schema import Spec, validate

Share = Annotated[float, Field(ge=0, le=1)]
SchedulePoint = tuple[Annotated[float, Field(ge=0)], Share]


class Distillation(Spec):
    """What the methods share: SGD towards the teacher's answers.

    Defaults are as published; the schedule `short`, ours, puts others in their place.
    """

    SHORT: ClassVar[Mapping[str, Any]] = {}
    OWN_STATISTICS: ClassVar[bool] = True  # normalisation in training mode

    schedule: Literal["short", "paper"] = Field("short", description="Which defaults hold.")
    epochs: int = Field(300, gt=0, description="Passes over the images, at most.")
    batch: int = Field(128, gt=1, description="Images per step.")
    learning_rate: float = Field(1e-3, gt=0)
    decay: Literal["none", "cosine"] = Field("none", description="Of the learning rate, to 0.")
    momentum: float = Field(0.9, ge=0, lt=1)
    temperature: tuple[float, float] = Field(
        (40.0, 40.0), description="Of the softmax, in the first epoch and in the last."
    )
    mirrors: bool = Field(
        True, description="Mirror and shift images at random; the teacher sees the same ones."
    )
    largest_gradient: float | None = Field(
        None, gt=0, description="Norm at which gradients are clipped; null: never."
    )
    keep_from: int | None = Field(
        50,
        ge=0,
        description="From this epoch on, the student with the lowest KD loss is kept; null, or"
        " where there is none: the last one.",
    )
    patience: int | None = Field(
        None, gt=0, description="Stop when KD has not improved for so many epochs; null: never."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_unless_said_otherwise(cls, table: Any) -> Any:
        if not isinstance(table, Mapping) or table.get("schedule", "short") != "short":
            return table
        return {**cls.SHORT, **table}


class Kd(Distillation):
    """Distillation alone; keeps accuracy and, as a rule, the backdoor."""

    SHORT: ClassVar[Mapping[str, Any]] = {
        "epochs": 20, "learning_rate": 0.01, "decay": "cosine", "temperature": (4.0, 4.0),
        "largest_gradient": 1.0, "keep_from": 0, "patience": 6,
    }  # fmt: skip

    kind: Literal["kd"] = "kd"


class Bcu(Distillation):
    """Forget at random, deeper layers more, then distil (Pang et al., CVPR 2023)."""

    SHORT: ClassVar[Mapping[str, Any]] = {
        "epochs": 20, "batch": 128, "largest_gradient": 1.0,
    }  # fmt: skip

    kind: Literal["bcu"] = "bcu"
    epochs: int = Field(100, gt=0)
    batch: int = Field(256, gt=1)
    learning_rate: float = Field(0.01, gt=0)
    decay: Literal["none", "cosine"] = "cosine"
    temperature: tuple[float, float] = (1.0, 4.0)
    keep_from: int | None = Field(None, ge=0)  # losses at several temperatures do not compare
    stem: Share = Field(0.01, description="Share of the first layer's weights drawn anew.")
    depths: tuple[Share, ...] = Field(
        (0.01, 0.03, 0.09, 0.27),
        min_length=1,
        description="The same for equal parts of the layers between, the deepest last.",
    )
    head: Share = Field(0.1, description="The same for the last layer.")


class Asd(Distillation):
    """Push neurons to the side of zero where the teacher's are not, then distil back."""

    SHORT: ClassVar[Mapping[str, Any]] = {
        "epochs": 40, "learning_rate": 0.03, "decay": "cosine", "temperature": (4.0, 4.0),
        "largest_gradient": 1.0, "patience": 8, "keep_from": 10, "shift_until": 1.2,
        "kd_share": ((0, 0.0), (7, 0.0), (8, 0.9), (10, 1.0)),
    }  # fmt: skip

    kind: Literal["asd"] = "asd"
    kd_share: tuple[SchedulePoint, ...] = Field(
        ((0.0, 0.0), (9.0, 0.0), (10.0, 0.9), (20.0, 0.9), (40.0, 1.0)),
        min_length=1,
        description="Weight of KD by epoch, straight lines between; the rest is for the shift.",
    )
    shift_until: float = Field(
        0.0,
        ge=0,
        le=4,
        description="Shifting alone ends early, at the first batch where its loss is below this; 4"
        " is where all neurons share the teacher's state, 0 where none does.",
    )
    floor: float = Field(
        1e-3, gt=0, description="Values below this share of a layer's rms push no harder."
    )
    deepest: float = Field(
        1.0, gt=0, le=1, description="Share of the layers found by structure that are watched."
    )
    watch: tuple[str, ...] = Field(
        (), description="Shell-style patterns of layer names; else layers are found by structure."
    )

    @model_validator(mode="after")
    def _epochs_rise(self) -> Asd:
        epochs = [epoch for epoch, _ in self.kd_share]
        if epochs != sorted(set(epochs)):
            raise ValueError("kd_share: epochs must rise")
        return self

    @property
    def recovery(self) -> float:
        """The first epoch of the schedule that is not for the shift alone."""
        return next((epoch for epoch, share in self.kd_share if share > 0), float(self.epochs))


class Unlearn(Distillation):
    """Find what leads to a class too easily, and distil answers that do not mind it. Ours.

    Trigger inversion (Wang et al., Neural Cleanse, S&P 2019) names the suspicious classes; then
    the student learns the teacher's answer to the plain image also for the disturbed one, while
    the disturbances are sought anew against the student all the time.
    """

    SHORT: ClassVar[Mapping[str, Any]] = {
        "epochs": 3, "learning_rate": 5e-3, "decay": "cosine", "temperature": (4.0, 4.0),
        "largest_gradient": 5.0, "keep_from": None,
    }  # fmt: skip
    OWN_STATISTICS: ClassVar[bool] = False

    kind: Literal["unlearn"] = "unlearn"
    schedule: Literal["short"] = "short"
    least_steps: int = Field(
        117, gt=0, description="More epochs than `epochs` if they have fewer steps together."
    )
    survey_steps: int = Field(
        200, gt=0, description="Of the search for the least perturbation that leads to each class."
    )
    survey_images: int = Field(10, gt=0, description="Per class and step of that search.")
    suspicious: float = Field(
        0.5, gt=0, description="A class is, whose perturbation is below this share of the median."
    )
    weight: float = Field(4.0, gt=0, description="Of the loss on disturbed images.")
    slots: int = Field(12, gt=0, description="Perturbations of a kind that are sought at a time.")
    slot_images: int = Field(10, gt=0, description="Per perturbation and step.")
    lifetime: int = Field(60, gt=0, description="Steps after which one is sought anew from noise.")
    reach: tuple[float, float] = Field(
        (0.2, 3.0), description="Their sizes, from and to, as shares of the median."
    )
    strength: float = Field(1.5, ge=1, description="They are shown up to so many times stronger.")
    warm_up: int = Field(10, ge=0, description="Steps of the search before the student moves.")
    further: float = Field(
        1.25,
        ge=0,
        description="How far to go the way that the student's weights went: 1 is where it stopped.",
    )


Sanitizer = Kd | Bcu | Asd | Unlearn


class _Named(Spec):
    sanitizer: Annotated[Sanitizer, Field(discriminator="kind")]


def sanitizer(table: Mapping[str, Any], *, where: str) -> Sanitizer:
    """The sanitizer that `table` describes by its kind; what it leaves out has its default.

    Raises:
        InputError: there is no such kind, or a value is out of bounds.
    """
    return validate({"sanitizer": dict(table)}, _Named, where=where).sanitizer
