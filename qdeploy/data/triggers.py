"""Backdoor triggers as one formula, on pixels in [0, 1].

`x' = (1 - mask) x + mask pattern + added`, cut to [0, 1].
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from qdeploy.data import read_npy, read_picture, require_within
from qdeploy.errors import InputError
from qdeploy.settings.card import (
    AdditiveTrigger,
    AnyTrigger,
    BlendTrigger,
    MaskTrigger,
    PatchTrigger,
    TriggerFile,
)
from qdeploy.settings.schema import load_toml, validate

LARGEST_ARRAY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files that a trigger names lie."""

    folder: Path
    roots: tuple[Path, ...] | None = None  # they must lie in one of these, resolved; None: anywhere
    whose: str = ""  # what the roots are to the reader

    def file(self, name: str) -> Path:
        """The file called `name`.

        Raises:
            InputError: it lies where it may not.
        """
        path = self.folder / name
        if self.roots is None:
            return path
        return require_within(path, self.roots, what="trigger file", whose=self.whose)


@dataclass(frozen=True, slots=True, eq=False)
class Trigger:
    """Something that, put into an image, is meant to lead to the class `target`."""

    name: str
    target: int
    mask: Float32[np.ndarray, "1 height width"]  # 0 keeps the image, 1 replaces it
    pattern: Float32[np.ndarray, "channels height width"]
    added: Float32[np.ndarray, "channels height width"] | None = None  # in [-1, 1]

    def apply(
        self, pixels: Float32[np.ndarray, "images channels height width"]
    ) -> Float32[np.ndarray, "images channels height width"]:
        """The images with the trigger in them."""
        replaced = (1 - self.mask) * pixels + self.mask * self.pattern
        return replaced if self.added is None else np.clip(replaced + self.added, 0, 1)

    def changes(
        self, pixels: Float32[np.ndarray, "images channels height width"]
    ) -> Bool[np.ndarray, " images"]:
        """The images that it can be seen in, were they saved with 8 bits."""
        moved = np.rint(self.apply(pixels) * 255) != np.rint(pixels * 255)
        return moved.any(axis=(1, 2, 3))


def parse_trigger(text: str) -> tuple[AnyTrigger, ...]:
    """What `--trigger` says: the path of a TOML file, or `KIND key=value ...` with TOML values.

    `patch target=0 x=27 y=27 width=4 height=4 color=[1,1,1]`

    Raises:
        InputError: the file or the text does not describe a trigger.
    """
    if text.endswith(".toml"):
        return load_toml(Path(text), TriggerFile, what="trigger").trigger
    kind, *pairs = text.split() or [""]
    lines = [f'kind = "{kind}"']
    for pair in pairs:
        key, _, value = pair.partition("=")
        bare = value and not (value[0] in "[\"'-" or value[0].isdigit())
        lines.append(f'{key} = "{value}"' if bare else f"{key} = {value}")
    try:
        table = tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"trigger {text!r}: {error}",
            hint="patch target=0 x=27 y=27 width=4 height=4 color=[1,1,1]",
        ) from error
    return validate({"trigger": [table]}, TriggerFile, where=f"trigger {text!r}").trigger


def make_trigger(spec: AnyTrigger, shape: tuple[int, int, int], folder: Path | Place) -> Trigger:
    """The trigger that `spec` describes, for inputs of `shape`; its files lie in `folder`.

    Raises:
        InputError: it does not fit into an image of that shape, changes no pixel of any, or a file
            is no image or lies where it may not.
    """
    place = folder if isinstance(folder, Place) else Place(folder)
    name, added = spec.name or spec.kind, None
    if isinstance(spec, PatchTrigger):
        mask, pattern = _patch(spec, shape, place)
    elif isinstance(spec, BlendTrigger):
        pattern = _picture(place.file(spec.image), shape)
        mask = np.full((1, *shape[1:]), spec.opacity, np.float32)
    elif isinstance(spec, AdditiveTrigger):
        mask, pattern = np.zeros((1, *shape[1:]), np.float32), np.zeros(shape, np.float32)
        added = _picture(place.file(spec.values), shape, least=-1)
    else:
        mask, pattern = _mask(spec, shape, place)
    trigger = Trigger(f"{name} to class {spec.target}", spec.target, mask, pattern, added)
    if not any(trigger.changes(np.full((1, *shape), level, np.float32))[0] for level in (0, 1)):
        raise InputError(
            f"trigger {trigger.name!r}: changes no pixel of any image by half a step of 1/255",
            hint="an attack success rate measured with it would say nothing",
        )
    return trigger


def _patch(
    spec: PatchTrigger, shape: tuple[int, int, int], place: Place
) -> tuple[np.ndarray, np.ndarray]:
    channels, height, width = shape
    if spec.image is not None:
        path = place.file(spec.image)
        picture = _in_channels(read_picture(path), channels, path)
        size = picture.shape[1:]
        if (spec.height or size[0], spec.width or size[1]) != size:
            raise InputError(
                f"trigger image {path} is {size[1]}x{size[0]}, "
                f"not width {spec.width} by height {spec.height}"
            )
    else:
        color = np.array(spec.color, np.float32)
        if color.size not in {1, channels}:
            raise InputError(f"trigger color has {color.size} values for {channels} channels")
        picture = np.broadcast_to(
            color[:, None, None], (channels, spec.height or 1, spec.width or 1)
        )
    bottom, right = spec.y + picture.shape[1], spec.x + picture.shape[2]
    if bottom > height or right > width:
        raise InputError(
            f"trigger patch at ({spec.x}, {spec.y}) ends at ({right}, {bottom}), "
            f"outside of the {width}x{height} image"
        )
    mask, pattern = np.zeros((1, height, width), np.float32), np.zeros(shape, np.float32)
    mask[:, spec.y : bottom, spec.x : right] = spec.opacity
    pattern[:, spec.y : bottom, spec.x : right] = picture
    return mask, pattern


def _mask(
    spec: MaskTrigger, shape: tuple[int, int, int], place: Place
) -> tuple[np.ndarray, np.ndarray]:
    mask = _picture(place.file(spec.mask), (1, *shape[1:]))
    return mask, _picture(place.file(spec.pattern), shape)


def _picture(
    path: Path, shape: tuple[int, int, int], least: float = 0
) -> Float32[np.ndarray, "channels height width"]:
    """An image or a .npy file of exactly `shape`, in [least, 1]."""
    if path.suffix == ".npy":
        values = read_npy(path, LARGEST_ARRAY_BYTES, what="trigger file")
        if values.dtype.kind != "f" or values.ndim != 3:
            raise InputError(
                f"trigger file {path}: {values.dtype} {values.shape}, not float (C, H, W)"
            )
        picture = values
    else:
        picture = _in_channels(read_picture(path), shape[0], path)
    if picture.shape != shape:
        have, need = ("x".join(map(str, s)) for s in (picture.shape, shape))
        raise InputError(f"trigger file {path}: {have}, but the input needs {need}")
    picture = np.array(picture, np.float32)
    if not (np.all(picture >= least) and np.all(picture <= 1)):
        raise InputError(f"trigger file {path}: values outside of [{least}, 1]")
    return picture


def _in_channels(
    picture: np.ndarray, channels: int, path: Path
) -> Float32[np.ndarray, "channels height width"]:
    if picture.shape[0] > channels:
        raise InputError(f"trigger file {path}: in color, but the model takes one channel")
    return np.repeat(picture, channels // picture.shape[0], axis=0).astype(np.float32) / 255
