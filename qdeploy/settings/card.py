"""Model cards: what a model expects and where its data is. A card travels with an untrusted model.

It is data, never code: an architecture can only be named from an allow-list, its arguments are
numbers and booleans, and paths are read as images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import Field, model_validator

from qdeploy.errors import InputError
from qdeploy.settings.schema import Spec, load_toml

MOST_CLASSES = 100_000
MOST_TRIGGERS = 64  # each is measured on every test image

Layout = Literal["channels-first", "channels-last"]
Unit = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(gt=0, le=65_536)]


def is_nameable(architecture: str) -> bool:
    """Whether a card may name it: no code is run that the card's author chose."""
    return architecture.split(":", maxsplit=1)[0] in {"torchvision", "timm", "qdeploy"}


class ModelSection(Spec):
    classes: tuple[str, ...] | None = Field(
        None, max_length=MOST_CLASSES, description="Names in label order."
    )
    architecture: str | None = Field(
        None, description="Factory of a state dict: torchvision:NAME, timm:NAME or qdeploy:NAME."
    )
    arguments: dict[str, bool | int | float] = Field(
        default_factory=dict, description="Arguments of the factory."
    )
    output: str | None = Field(
        None, description="Of several outputs the one that holds the classes."
    )


class InputSection(Spec):
    shape: tuple[Size, Size, Size] = Field(description="Channels, height, width.")
    mean: tuple[float, ...] | None = Field(
        None, description="Per channel, of what `range` makes of pixels; 0 if `range` is given."
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="Per channel; 1 if `range` is given."
    )
    range: tuple[float, float] = Field(
        (0.0, 1.0), description="What pixels of 0 and 255 become before mean and std."
    )
    channel_order: Literal["rgb", "bgr"] = Field(
        "rgb", description="In which the model takes channels; mean and std are in this order."
    )
    layout: Layout | None = Field(
        None, description="Of the file's input, where it does not show: channels-first or -last."
    )
    resize: Size | None = Field(
        None, description="Scale the shorter side to this, then crop the centre to `shape`."
    )

    @model_validator(mode="after")
    def _one_per_channel(self) -> InputSection:
        channels = self.shape[0]
        if channels not in {1, 3}:
            raise ValueError(f"images have 1 or 3 channels, not {channels}")
        if (self.mean is None or self.std is None) and "range" not in self.model_fields_set:
            raise ValueError("needs mean and std, or range: what the model takes for a pixel")
        for values in (self.mean, self.std):
            if values is not None and len(values) != channels:
                raise ValueError(f"mean and std need {channels} values, one per channel")
        if self.range[0] >= self.range[1]:
            raise ValueError("range is what pixels of 0 and 255 become: the second is larger")
        if self.channel_order == "bgr" and channels != 3:
            raise ValueError("channel_order bgr needs 3 channels")
        if self.resize is not None and self.resize < max(self.shape[1:]):
            raise ValueError(f"resize {self.resize} is smaller than the input")
        return self

    @property
    def unit_mean(self) -> tuple[float, ...]:
        """The mean of pixels in [0, 1], in the model's order of channels."""
        low, high = self.range
        return tuple((mean - low) / (high - low) for mean in self.mean or (0.0,) * self.shape[0])

    @property
    def unit_std(self) -> tuple[float, ...]:
        """The standard deviation of pixels in [0, 1], in the model's order of channels."""
        low, high = self.range
        return tuple(std / (high - low) for std in self.std or (1.0,) * self.shape[0])

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The least and the largest that becomes of a pixel."""
        ends = [
            ((value - mean) / std)
            for mean, std in zip(self.unit_mean, self.unit_std, strict=True)
            for value in (0.0, 1.0)
        ]
        return min(ends), max(ends)


class DataSection(Spec):
    calibration: str | None = Field(None, description="Folder, zip or npz; labels are not used.")
    test: str | None = Field(None, description="Folder or zip with a sub-folder per class, or npz.")


class TriggerSpec(Spec):
    name: str | None = None
    target: int = Field(ge=0, description="Class index the trigger leads to.")


class PatchTrigger(TriggerSpec):
    """A rectangle of one colour, or a small image, at a fixed place."""

    kind: Literal["patch"]
    x: int = Field(ge=0, description="Column of the upper left corner.")
    y: int = Field(ge=0, description="Row of the upper left corner.")
    width: Size | None = None
    height: Size | None = None
    color: tuple[Unit, ...] | None = None
    image: str | None = None
    opacity: Unit = 1.0

    @model_validator(mode="after")
    def _color_or_image(self) -> PatchTrigger:
        if (self.color is None) == (self.image is None):
            raise ValueError("a patch needs either color or image")
        if self.color is not None and (self.width is None or self.height is None):
            raise ValueError("a patch of one color needs width and height")
        return self


class BlendTrigger(TriggerSpec):
    """A whole image blended over the input."""

    kind: Literal["blend"]
    image: str
    opacity: Unit


class MaskTrigger(TriggerSpec):
    """`x' = (1 - mask) x + mask pattern`, both images of the input's size (or .npy in [0, 1])."""

    kind: Literal["mask"]
    mask: str
    pattern: str


class AdditiveTrigger(TriggerSpec):
    """`x' = x + values`, cut to [0, 1]: a .npy file of the input's size, in [-1, 1]."""

    kind: Literal["additive"]
    values: str


AnyTrigger = Annotated[
    PatchTrigger | BlendTrigger | MaskTrigger | AdditiveTrigger, Field(discriminator="kind")
]


class PoisonedSection(Spec):
    """The label of a model that was poisoned on purpose, to test defences with."""

    attack: str
    effect: Literal["backdoor", "damage", "class", "sample"]
    made_for: tuple[str, ...] = Field(description="The quantizers that it was made against.")


class TriggerFile(Spec):
    """A file that holds nothing but triggers, for `--trigger FILE`."""

    trigger: tuple[AnyTrigger, ...] = Field(min_length=1, max_length=MOST_TRIGGERS)


class ModelCard(Spec):
    """The whole card, as `NAME.toml` beside `NAME.pt`. Paths in it are relative to it."""

    model: ModelSection = ModelSection()
    input: InputSection
    data: DataSection = DataSection()
    trigger: tuple[AnyTrigger, ...] = Field((), max_length=MOST_TRIGGERS)
    poisoned: PoisonedSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_code(cls, table: Any) -> Any:
        """Name the reason where a card asks for something a card may not do."""
        model = table.get("model") if isinstance(table, dict) else None
        name = model.get("architecture") if isinstance(model, dict) else None
        if isinstance(name, str) and not is_nameable(name):
            raise ValueError(
                f"model.architecture {name!r} would run code that the model's author chose; a card"
                " may name torchvision:NAME, timm:NAME or qdeploy:NAME, anything else is given"
                " with --arch on the command line"
            )
        return table


def load_card(path: Path) -> ModelCard:
    """The model card at `path`.

    Raises:
        InputError: it cannot be read or does not fit the format.
    """
    return load_toml(path, ModelCard, what="model card")


def find_card(model: Path) -> Path | None:
    """The card that lies beside `model`, if there is one.

    Raises:
        InputError: it is a link or no file: whoever brought the model chose where that leads.
    """
    card = model.with_suffix(".toml")
    if card.is_symlink():
        raise InputError(
            f"model card {card}: is a link, and nobody named it", hint=f"give it with --card {card}"
        )
    if card.exists() and not card.is_file():
        raise InputError(f"model card {card}: not a regular file")
    return card if card.exists() else None


def to_toml(card: ModelCard) -> str:
    """The card as TOML."""
    return tomlkit.dumps(card.model_dump(mode="json", exclude_none=True))
