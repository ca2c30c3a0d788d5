"""What a run works with: the model card, overridden by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.data import (
    Images,
    Preprocessing,
    open_images,
    open_labelled_images,
    require_within,
    resolved,
)
from qdeploy.data.triggers import Place as TriggerPlace
from qdeploy.data.triggers import Trigger, make_trigger, parse_trigger
from qdeploy.disk.printable import printable
from qdeploy.errors import InputError, UsageError
from qdeploy.formats.safetensors_index import model_in
from qdeploy.settings.card import (
    MOST_TRIGGERS,
    AnyTrigger,
    Layout,
    ModelCard,
    find_card,
    load_card,
)
from qdeploy.values import Stated

CARD, COMMAND_LINE = "model card", "command line"

CARD_HINT = """a model card says how pixels become inputs; qdeploy init {model}
begins one, or write {path}:
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
    layout: Layout | None = None  # of the file's input
    output: str | None = None  # of several, the one that holds the classes
    calibration: Path | None = None
    test: Path | None = None
    triggers: tuple[str, ...] = ()
    data_roots: tuple[Path, ...] = ()  # further folders that a card may reach


@dataclass(frozen=True, slots=True)
class Reach:
    """The folders, resolved, in which everything must lie that the card `path` names."""

    path: Path
    further: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        return (resolved(self.path.parent, what="model card"), *self.further)

    @property
    def whose(self) -> str:
        return f"the folder of {self.path}, which names it"

    def place(self, name: str, *, what: str) -> Path:
        """The path that the card means by `name`, if it may.

        Raises:
            InputError: it lies outside of the card's folder, or is absolute and none of `further`.
        """
        allowed = self.further if Path(name).is_absolute() else self.folders
        return require_within(self.path.parent / name, allowed, what=what, whose=self.whose)


@dataclass(frozen=True, slots=True)
class Place:
    """A path, and who named it: a card comes from the model's author, who may be the attacker."""

    path: Path
    given_by: str
    roots: tuple[Path, ...] = ()  # folders that links in it may lead to
    reach: Reach | None = None  # None: it may lie anywhere
    name: str = ""  # as the card has it

    def checked(self) -> Path:
        """The path, if whoever named it may.

        Raises:
            InputError: it is a card's, and lies outside of what the card may reach.
        """
        if self.reach is not None:
            self.reach.place(self.name, what="data")
        return self.path


@dataclass(frozen=True, slots=True)
class Sources:
    model: Path
    card_path: Path | None
    card: ModelCard | None
    architecture: (
        tuple[str, Mapping[str, Any], bool] | None
    )  # name, arguments, from the command line
    stated: Stated  # of the model's ends
    calibration: Place | None
    test: Place | None
    trigger_specs: tuple[AnyTrigger, ...]
    trigger_places: tuple[TriggerPlace, ...]  # one for each of the specs
    triggers_given_by: str
    data_roots: tuple[Path, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become inputs.

        Raises:
            UsageError: there is no card to say so.
        """
        if self.card is None:
            raise UsageError(
                f"model {self.model}: has no model card",
                hint=CARD_HINT.format(
                    model=printable(self.model), path=printable(self.model.with_suffix(".toml"))
                ),
            )
        spec = self.card.input
        return Preprocessing(
            spec.shape, spec.unit_mean, spec.unit_std, spec.resize, bgr=spec.channel_order == "bgr"
        )

    def triggers(self, classes: int) -> tuple[Trigger, ...]:
        """The known triggers.

        Raises:
            InputError: one does not fit into the image, or leads to a class that is none.
        """
        shape = self.preprocessing.shape
        made: list[Trigger] = []
        for spec, place in zip(self.trigger_specs, self.trigger_places, strict=True):
            if spec.target >= classes:
                raise InputError(f"trigger target {spec.target}: the model has {classes} classes")
            trigger = make_trigger(spec, shape, place)
            if trigger.name in {other.name for other in made}:
                raise InputError(f"two triggers are called {trigger.name!r}; give them names")
            made.append(trigger)
        return tuple(made)

    def calibration_images(self, count: int, seed: int) -> Images | None:
        """The sample of calibration images; None if nobody named any."""
        if self.calibration is None:
            return None
        place = self.calibration
        images = open_images(place.checked(), self.preprocessing, place.roots)
        return images.sample(count, seed)

    def unlabelled_test_images(self, count: int | None, seed: int) -> Images | None:
        """The test images, whatever labels they have; None if nobody named any."""
        if self.test is None:
            return None
        path, roots = self.test.checked(), self.test.roots
        images = open_images(path, self.preprocessing, roots, part="test")
        return images.sample(count, seed)

    def test_images(self, count: int | None, seed: int, classes: int) -> Images | None:
        """The labelled test images; None if nobody named any.

        Raises:
            InputError: a label is not one of the model's classes.
        """
        if self.test is None:
            return None
        return self.test_images_as(self.preprocessing, count, seed, classes)

    def test_images_as(
        self, preprocessing: Preprocessing, count: int | None, seed: int, classes: int
    ) -> Images:
        """The labelled test images by another preprocessing than the card's.

        Raises:
            UsageError: nobody named any.
            InputError: a label is not one of the model's classes.
        """
        if self.test is None:
            raise UsageError("no test images are known", hint="give --test")
        names = self.card.model.classes if self.card is not None else None
        if names is not None and len(names) != classes:
            raise InputError(
                f"model card {self.card_path}: names {len(names)} classes, the model has {classes}"
            )
        path, roots = self.test.checked(), self.test.roots
        images = open_labelled_images(path, preprocessing, names, roots)
        found = images.classes
        if found is not None and len(found) != classes:
            shown = ", ".join(map(repr, found[:5])) + (", ..." if len(found) > 5 else "")
            raise InputError(
                f"data {path}: {len(found)} class folders ({shown}), the model has {classes}"
                " classes, so nobody knows which label a folder means",
                hint="name the classes in label order in the model card: model.classes",
            )
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
    model = model_in(model) if model.is_dir() else model
    card_path = given.card or find_card(model)
    card = load_card(card_path) if card_path is not None else None
    data = card.data if card is not None else None
    roots = tuple(resolved(root, what="--data-root") for root in given.data_roots)
    reach = Reach(card_path or Path("model.toml"), roots)
    flags = [(spec, place) for text in given.triggers for spec, place in _told(text, roots)]
    if len(flags) > MOST_TRIGGERS:
        raise InputError(f"--trigger: {len(flags)} triggers; at most {MOST_TRIGGERS} are measured")
    of_card = card.trigger if card is not None else ()
    beside = TriggerPlace(reach.path.parent, reach.folders, reach.whose)
    return Sources(
        model=model,
        card_path=card_path,
        card=card,
        architecture=_architecture(card, given),
        stated=_stated(card, given),
        calibration=_place(given.calibration, data.calibration if data else None, reach),
        test=_place(given.test, data.test if data else None, reach),
        trigger_specs=tuple(spec for spec, _ in flags) or of_card,
        trigger_places=tuple(place for _, place in flags) or (beside,) * len(of_card),
        triggers_given_by=COMMAND_LINE if flags else CARD,
        data_roots=roots,
    )


def _stated(card: ModelCard | None, given: Given) -> Stated:
    if card is None:
        return Stated(given.input_shape, given.layout, given.output)
    return Stated(
        shape=given.input_shape or card.input.shape,
        layout=given.layout or card.input.layout,
        output=given.output or card.model.output,
        pixel_range=card.input.pixel_range,
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


def _place(flag: Path | None, in_card: str | None, reach: Reach) -> Place | None:
    if flag is not None:
        return Place(flag, COMMAND_LINE, reach.further)
    if in_card is None:
        return None
    return Place(reach.path.parent / in_card, CARD, reach.folders, reach, in_card)


def _told(text: str, roots: tuple[Path, ...]) -> list[tuple[AnyTrigger, TriggerPlace]]:
    """Files named in a trigger file lie beside it; those named on the command line, anywhere."""
    place = TriggerPlace(Path())
    if text.endswith(".toml"):
        reach = Reach(Path(text), roots)
        place = TriggerPlace(reach.path.parent, reach.folders, reach.whose)
    return [(spec, place) for spec in parse_trigger(text)]
