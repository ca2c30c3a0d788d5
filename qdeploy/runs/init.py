"""A first model card: what a file says of itself, and guesses, marked as such."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qdeploy.disk.files import require_writable, write_atomically
from qdeploy.disk.printable import printable
from qdeploy.errors import UsageError
from qdeploy.formats.onnx.reading import read_untrusted
from qdeploy.formats.opening import sniff
from qdeploy.formats.static import refuse_hostile
from qdeploy.graph.ends import SeenEnds, seen_ends

GUESSED_SHAPE = (3, 224, 224)
IMAGENET = ("[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]")
GUESS = "# GUESS: "
USUAL_CROP = 0.875


@dataclass(frozen=True, slots=True)
class Begun:
    """The card, and what is still to be said in it."""

    path: Path
    guesses: tuple[str, ...]


def begin(model: Path, out: Path | None, shape: tuple[int, int, int] | None) -> Begun:
    """Write the card of `model` beside it, or at `out`.

    Raises:
        UsageError: there is a card already.
        InputError: nobody should open the file, or it takes no images.
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
    text = card_text(model.name, seen, shape, tensors_alone=row.tensors_alone)
    write_atomically(path, text.encode())
    guesses = [line for line in text.splitlines() if GUESS in line and not line.startswith("#")]
    return Begun(path, tuple(line.split(GUESS)[0].strip() for line in guesses))


def card_text(
    name: str,
    seen: SeenEnds | None,
    shape: tuple[int, int, int] | None,
    *,
    tensors_alone: bool = False,
) -> str:
    """The card as TOML with comments.

    Args:
        seen: What an ONNX file says; None for others.
        shape: Channels, height and width, where the user says it.
        tensors_alone: The file holds weights, and no network.
    """
    lines = [
        f"# {printable(name)}: what it takes and gives. Check what is marked as a guess:",
        "# wrong values cost accuracy, and nothing else will tell.",
        "",
        "[model]",
        '# classes = ["cat", "dog"]  # in label order; folders of test data are matched by name',
        *_network(seen, tensors_alone=tensors_alone),
        "",
        "[input]",
        *_input(seen, shape),
        "",
        "[data]",
        '# calibration = "train"  # a few hundred images: folder, zip or npz',
        '# test = "test"  # labelled: a folder per class, a zip of that, or an npz with x and y',
    ]
    return "\n".join(lines) + "\n"


def _network(seen: SeenEnds | None, *, tensors_alone: bool) -> list[str]:
    if tensors_alone:
        return [
            '# architecture = "torchvision:resnet18"  # or timm:NAME; else --arch file.py:factory'
        ]
    if seen is None or len(seen.outputs) == 1:
        count = f"# the file gives {seen.classes} classes" if seen and seen.classes else None
        return [count] if count else []
    names = ", ".join(map(printable, seen.outputs))
    return [f"output = {_quoted(seen.outputs[0])}  {GUESS}of {names} the one with the classes"]


def _input(seen: SeenEnds | None, shape: tuple[int, int, int] | None) -> list[str]:
    taken, why = _shape(seen, shape)
    lines = [f"shape = {list(taken)}  {why}"]
    if seen is not None and seen.layout == "channels-last":
        lines.append('layout = "channels-last"  # seen from the shape')
    if seen is not None and seen.takes_pixels:
        lines.append(f"range = [0, 255]  # the file takes {seen.takes}: pixels as they are")
    elif seen is not None and seen.layout == "channels-last":
        lines.append(
            f"range = [-1, 1]  {GUESS}most of TensorFlow's; others take [0, 1] or [0, 255]"
        )
    elif taken[0] == 1:
        lines += [f"mean = [0.0]  {GUESS}pixels in [0, 1]", f"std = [1.0]  {GUESS}as well"]
    else:
        mean, std = IMAGENET
        lines += [f"mean = {mean}  {GUESS}ImageNet's", f"std = {std}  {GUESS}as well"]
    if min(taken[1:]) > 64:
        lines.append(
            f"resize = {round(max(taken[1:]) / USUAL_CROP)}  {GUESS}the usual frame around a crop"
        )
    return lines


def _shape(
    seen: SeenEnds | None, shape: tuple[int, int, int] | None
) -> tuple[tuple[int, int, int], str]:
    """Channels, height and width, and a comment on how they are known."""
    if shape is not None:
        return shape, "# channels, height, width, as given"
    if seen is None:
        return GUESSED_SHAPE, f"{GUESS}channels, height, width; the file does not say"
    sizes = seen.sizes
    if len(sizes) == 1 and sizes[0] is not None:
        side = round((sizes[0]) ** 0.5)
        if side * side == sizes[0]:
            return (1, side, side), f"{GUESS}the file takes {sizes[0]} values in a row"
    if len(sizes) != 3:
        return GUESSED_SHAPE, f"{GUESS}channels, height, width; the file does not say"
    known = sizes if seen.layout == "channels-first" else (sizes[2], *sizes[:2])
    channels, height, width = (
        size or guess for size, guess in zip(known, GUESSED_SHAPE, strict=True)
    )
    sure = None not in known
    where = (
        "# channels, height, width, as the file says" if sure else f"{GUESS}the file leaves it open"
    )
    return (channels, height, width), where


def _quoted(text: str) -> str:
    """A TOML string."""
    return '"' + printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
