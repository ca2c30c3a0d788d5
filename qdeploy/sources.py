"""What a run works with: the model card, overridden by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.card import AnyTrigger, ModelCard, find_card, load_card
from qdeploy.data import Images, Preprocessing, open_images, open_labelled_images
from qdeploy.errors import InputError, UsageError
from qdeploy.triggers import Trigger, make_trigger, parse_trigger

CARD, COMMAND_LINE = "model card", "command line"

CARD_HINT = """a model card says how pixels become inputs; write {path}:
  [input]
  shape = [3, 224, 224]
  mean = [0.485, 0.456, 0.406]
  std = [0.229, 0.224, 0.225]"""


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave on the command line, besides the model."""

    card: Path | None = None
    architecture: str | None = None
    arguments: Mapping[str, Any] | None = None
    input_shape: tuple[int, int, int] | None = None
    calibration: Path | None = None
    test: Path | None = None
    triggers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """A path, and who named it: a card comes from the model's author, who may be the attacker."""

    path: Path
    given_by: str


@dataclass(frozen=True, slots=True)
class Sources:
    model: Path
    card_path: Path | None
    card: ModelCard | None
    architecture: (
        tuple[str, Mapping[str, Any], bool] | None
    )  # name, arguments, from the command line
    shape: tuple[int, int, int] | None
    calibration: Place | None
    test: Place | None
    trigger_specs: tuple[AnyTrigger, ...]
    trigger_folder: Path
    triggers_given_by: str

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become inputs.

        Raises:
            UsageError: there is no card to say so.
        """
        if self.card is None:
            raise UsageError(
                f"model {self.model}: has no model card",
                hint=CARD_HINT.format(path=self.model.with_suffix(".toml")),
            )
        spec = self.card.input
        return Preprocessing(spec.shape, spec.mean, spec.std, spec.resize)

    def triggers(self, classes: int) -> tuple[Trigger, ...]:
        """The known triggers.

        Raises:
            InputError: one does not fit into the image, or leads to a class that is none.
        """
        shape = self.preprocessing.shape
        made: list[Trigger] = []
        for spec in self.trigger_specs:
            if spec.target >= classes:
                raise InputError(f"trigger target {spec.target}: the model has {classes} classes")
            trigger = make_trigger(spec, shape, self.trigger_folder)
            if trigger.name in {other.name for other in made}:
                raise InputError(f"two triggers are called {trigger.name!r}; give them names")
            made.append(trigger)
        return tuple(made)

    def calibration_images(self, count: int, seed: int) -> Images | None:
        """The sample of calibration images; None if nobody named any."""
        if self.calibration is None:
            return None
        return open_images(self.calibration.path, self.preprocessing).sample(count, seed)

    def test_images(self, count: int | None, seed: int, classes: int) -> Images | None:
        """The labelled test images; None if nobody named any.

        Raises:
            InputError: a label is not one of the model's classes.
        """
        if self.test is None:
            return None
        names = self.card.model.classes if self.card is not None else None
        if names is not None and len(names) != classes:
            raise InputError(
                f"model card {self.card_path}: names {len(names)} classes, the model has {classes}"
            )
        images = open_labelled_images(self.test.path, self.preprocessing, names)
        assert images.labels is not None  # noqa: S101 - just opened with labels
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"data {self.test.path}: labels run from {low} to {high}, "
                f"but the model has {classes} classes"
            )
        return images.sample(count, seed)


def resolve(model: Path, given: Given) -> Sources:
    """The card beside the model (or the one given), with everything given put over it.

    Raises:
        InputError: the card is not valid.
    """
    card_path = given.card or find_card(model)
    card = load_card(card_path) if card_path is not None else None
    folder = card_path.parent if card_path is not None else Path()
    data = card.data if card is not None else None
    flags = tuple(spec for text in given.triggers for spec in parse_trigger(text))
    return Sources(
        model=model,
        card_path=card_path,
        card=card,
        architecture=_architecture(card, given),
        shape=given.input_shape or (card.input.shape if card is not None else None),
        calibration=_place(given.calibration, data.calibration if data else None, folder),
        test=_place(given.test, data.test if data else None, folder),
        trigger_specs=flags or (card.trigger if card is not None else ()),
        trigger_folder=_trigger_folder(given) if flags else folder,
        triggers_given_by=COMMAND_LINE if flags else CARD,
    )


def _architecture(
    card: ModelCard | None, given: Given
) -> tuple[str, Mapping[str, Any], bool] | None:
    named = card.model if card is not None else None
    arguments = given.arguments
    if arguments is None:
        arguments = named.arguments if named is not None else {}
    if given.architecture is not None:
        return given.architecture, given.arguments or {}, True
    if named is None or named.architecture is None:
        return None
    return named.architecture, arguments, False


def _place(flag: Path | None, in_card: str | None, folder: Path) -> Place | None:
    if flag is not None:
        return Place(flag, COMMAND_LINE)
    return None if in_card is None else Place(folder / in_card, CARD)


def _trigger_folder(given: Given) -> Path:
    """Files named in a trigger file lie beside it; those named on the command line, here."""
    files = [Path(text) for text in given.triggers if text.endswith(".toml")]
    return files[0].parent if files else Path()
