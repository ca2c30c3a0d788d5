"""A first model card: what a file says of itself, what was tried, and guesses, marked as such."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdeploy.data import open_labelled_images, shape_of_images
from qdeploy.data.images import Preprocessing
from qdeploy.disk.files import require_writable, write_atomically
from qdeploy.disk.printable import printable
from qdeploy.errors import QdeployError, UsageError
from qdeploy.formats.known import Format
from qdeploy.formats.onnx.reading import read_untrusted
from qdeploy.formats.opening import sniff
from qdeploy.formats.static import refuse_hostile
from qdeploy.graph.ends import SeenEnds, seen_ends
from qdeploy.inputs.sources import Given, resolve
from qdeploy.runs.normalisation import IMAGENET, Normalisation, as_toml, best_normalisation
from qdeploy.runs.opening import exported, open_source
from qdeploy.settings.card import is_nameable
from qdeploy.settings.device import AUTO, load_device

GUESSED_SHAPE = (3, 224, 224)
GUESS = "# GUESS: "
USUAL_CROP = 0.875
SHOWN_CLASSES = 8


@dataclass(frozen=True, slots=True)
class Begun:
    """The card, and what is still to be said in it."""

    path: Path
    guesses: tuple[str, ...]
    architecture: str | None = None  # that the card may not name, so that commands must
    images: bool = False  # are named in it, to calibrate and to test with


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What there is to write a card by."""

    seen: SeenEnds | None = None  # what an ONNX file says; None for others
    shape: tuple[int, int, int] | None = None  # channels, height, width, as the user says
    tensors_alone: bool = False  # the file holds weights, and no network
    pictures: tuple[int, int, int] | None = None  # the first of the images that were given
    classes: tuple[str, ...] | None = None  # the folders of the test data, in label order
    data: tuple[tuple[str, str], ...] = ()  # key and path, relative to the card
    out_of_reach: tuple[tuple[str, str], ...] = ()  # the same outside of the card's folder
    architecture: tuple[str, Mapping[str, Any]] | None = None  # that a card may name
    tried: Normalisation | None = None
    not_tried: str | None = None  # why no normalisation was


def begin(model: Path, out: Path | None, given: Given) -> Begun:
    """Write the card of `model` beside it, or at `out`.

    With labelled test images, and an architecture where the file has none, the usual normalisations
    are tried on them, and the one is written down that most are classified rightly with.

    Raises:
        UsageError: there is a card already.
        InputError: nobody should open the file, it takes no images, or the images given are none.
        OutputError: it cannot be written there.
    """
    path = out or model.with_suffix(".toml")
    if path.exists():
        raise UsageError(
            f"model card {path}: is there already", hint="give another name with --out"
        )
    require_writable(path)
    refuse_hostile(model, run_code_from_model=False)
    row = sniff(model)
    seen = seen_ends(read_untrusted(model), where=str(model)) if row.content == "onnx" else None
    within, outside = _placed(path, given)
    pictures = given.test or given.calibration
    known = Known(
        seen=seen,
        shape=given.input_shape,
        tensors_alone=row.tensors_alone,
        pictures=shape_of_images(pictures) if pictures is not None else None,
        classes=_classes(given.test),
        data=within,
        out_of_reach=outside,
        architecture=_nameable(given) if row.tensors_alone else None,
    )
    text = card_text(model.name, _tried(known, model, row, given))
    write_atomically(path, text.encode())
    guesses = [line for line in text.splitlines() if GUESS in line and not line.startswith("#")]
    return Begun(
        path,
        tuple(line.split(GUESS)[0].strip() for line in guesses),
        given.architecture if known.architecture is None else None,
        len(within) == 2,
    )


def _placed(card: Path, given: Given) -> tuple[tuple[tuple[str, str], ...], ...]:
    """The data that was given, by path from the card, in its folder and outside of it."""
    folder = card.parent.resolve()
    within, outside = [], []
    for key, path in (("calibration", given.calibration), ("test", given.test)):
        if path is None:
            continue
        place = path.resolve()
        if place.is_relative_to(folder):
            within.append((key, str(place.relative_to(folder))))
        else:
            outside.append((key, str(path)))
    return tuple(within), tuple(outside)


def _nameable(given: Given) -> tuple[str, Mapping[str, Any]] | None:
    """The architecture and its arguments, if a card may name it."""
    name = given.architecture
    if name is None or not is_nameable(name):
        return None
    return name, given.arguments or {}


def _classes(test: Path | None) -> tuple[str, ...] | None:
    """Names of the classes in label order, where folders or a file of labels name them."""
    if test is None:
        return None
    anything = Preprocessing((1, 1, 1), (0.0,), (1.0,))  # nothing is decoded
    return open_labelled_images(test, anything, None).classes


def _tried(known: Known, model: Path, row: Format, given: Given) -> Known:
    """The same with the normalisation that suits the labelled pictures, if there are any."""
    seen = known.seen
    if given.test is None or (seen is not None and seen.takes_pixels):
        return known
    if row.tensors_alone and given.architecture is None:
        return replace(known, not_tried="the file needs an --arch")
    shape, _ = _shape(known)
    sources = resolve(model, replace(given, card=None, input_shape=shape))
    try:
        loaded = open_source(sources, run_code_from_model=False)
        float_model = exported(loaded, sources, load_device(AUTO))
        return replace(known, tried=best_normalisation(float_model, sources, _resize(known)))
    except QdeployError as error:
        return replace(known, not_tried=str(error))


def card_text(name: str, known: Known) -> str:
    """The card as TOML with comments."""
    lines = [
        f"# {printable(name)}: what it takes and gives. Check what is marked as a guess:",
        "# wrong values cost accuracy, and nothing else will tell.",
        "",
        "[model]",
        *_network(known),
        "",
        "[input]",
        *_input(known),
        "",
        "[data]",
        *_data(known),
    ]
    return "\n".join(lines) + "\n"


def _network(known: Known) -> Iterator[str]:
    seen = known.seen
    if known.classes is not None:
        names = ", ".join(map(_quoted, known.classes))
        yield f"classes = [{names}]  {GUESS}label order is that of the folders' names"
    else:
        yield '# classes = ["cat", "dog"]  # in label order; test folders are matched by name'
    if known.architecture is not None:
        name, arguments = known.architecture
        yield f"architecture = {_quoted(name)}"
        if arguments:
            pairs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in arguments.items())
            yield f"arguments = {{ {pairs} }}"
    elif known.tensors_alone:
        yield '# architecture = "torchvision:resnet18"  # or timm:NAME; else --arch file.py:factory'
    elif seen is not None and len(seen.outputs) > 1:
        names = ", ".join(map(printable, seen.outputs))
        yield f"output = {_quoted(seen.outputs[0])}  {GUESS}of {names} the one with the classes"
    elif seen is not None and seen.classes:
        yield f"# the file gives {seen.classes} classes"


def _input(known: Known) -> Iterator[str]:
    seen = known.seen
    taken, why = _shape(known)
    yield f"shape = {list(taken)}  {why}"
    if seen is not None and seen.layout == "channels-last":
        yield 'layout = "channels-last"  # seen from the shape'
    if seen is not None and seen.takes_pixels:
        yield f"range = [0, 255]  # the file takes {seen.takes}: pixels as they are"
    elif known.tried is not None and known.tried.learnt:
        yield from _measured(known.tried)
    else:
        yield from _guessed(known, taken[0])
    resize = _resize(known)
    if resize is not None:
        yield f"resize = {resize}  {GUESS}the usual frame around a crop"


def _measured(tried: Normalisation) -> Iterator[str]:
    yield (
        f"# tried on {tried.right.samples:,} test images: {tried.name} gets"
        f" {tried.right.value:.1f} % right, the next best of the usual ones, {tried.next_best}"
    )
    for key, value in tried.fields.items():
        yield f"{key} = {as_toml(value)}" + ("" if tried.clear else f"  {GUESS}see above")


def _guessed(known: Known, channels: int) -> Iterator[str]:
    tried = known.tried
    if tried is not None:
        yield (
            f"# of the usual ones none gets more than {tried.right.value:.1f} % of"
            f" {tried.right.samples:,} test images right: another, other labels, or nothing learnt?"
        )
    elif known.not_tried is not None:
        yield f"# no normalisation was tried on the test images: {printable(known.not_tried)}"
    if known.seen is not None and known.seen.layout == "channels-last":
        yield f"range = [-1, 1]  {GUESS}most of TensorFlow's; others take [0, 1] or [0, 255]"
    elif channels == 1:
        yield f"mean = [0.0]  {GUESS}pixels in [0, 1]"
        yield f"std = [1.0]  {GUESS}as well"
    else:
        yield f"mean = {as_toml(IMAGENET['mean'])}  {GUESS}ImageNet's"
        yield f"std = {as_toml(IMAGENET['std'])}  {GUESS}as well"


def _data(known: Known) -> Iterator[str]:
    said = dict(known.data)
    examples = {
        "calibration": '"train"  # a few hundred images: folder, zip or npz',
        "test": '"test"  # labelled: a folder per class, a zip of that, or an npz with x and y',
    }
    for key, example in examples.items():
        yield f"{key} = {_quoted(said[key])}" if key in said else f"# {key} = {example}"
    for key, path in known.out_of_reach:
        yield f"# {printable(path)} is out of this card's folder: give it with --{key}"


def _resize(known: Known) -> int | None:
    """The shorter side before the crop; None where pictures are taken as they are."""
    shape, _ = _shape(known)
    if known.pictures is not None and known.pictures[1:] == shape[1:]:
        return None
    return round(max(shape[1:]) / USUAL_CROP) if min(shape[1:]) > 64 or known.pictures else None


def _shape(known: Known) -> tuple[tuple[int, int, int], str]:
    """Channels, height and width, and a comment on how they are known."""
    if known.shape is not None:
        return known.shape, "# channels, height, width, as given"
    open_ = known.pictures or GUESSED_SHAPE
    source = "the size of the images given" if known.pictures else "the file does not say"
    guess = f"{GUESS}channels, height, width; {source}"
    seen = known.seen
    if seen is None:
        return open_, guess
    sizes = seen.sizes
    if len(sizes) == 1 and sizes[0] is not None:
        side = round((sizes[0]) ** 0.5)
        if side * side == sizes[0]:
            return (1, side, side), f"{GUESS}the file takes {sizes[0]} values in a row"
    if len(sizes) != 3:
        return open_, guess
    first, second, third = sizes if seen.layout == "channels-first" else (sizes[2], *sizes[:2])
    channels, height, width = (first or open_[0], second or open_[1], third or open_[2])
    sure = None not in sizes
    where = (
        "# channels, height, width, as the file says" if sure else f"{GUESS}the file leaves it open"
    )
    return (channels, height, width), where


def _quoted(text: str) -> str:
    """A TOML string."""
    return '"' + printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
