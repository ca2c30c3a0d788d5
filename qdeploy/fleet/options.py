"""Options of commands in a manifest: typed as the verbs are, and written as command lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

from pydantic import TypeAdapter, ValidationError

from qdeploy.api.settings import (
    GateSettings,
    PathLike,
    SanitizeSettings,
    ScanSettings,
)
from qdeploy.errors import InputError
from qdeploy.fleet.manifest import PLACEHOLDERS

OWN = frozenset({"recipe", "policy", "device", "reports", "artifacts", "command"})
FLAGS = {
    "data_roots": "data-root",
    "triggers": "trigger",
    "widths": "bits",
    "activation_widths": "activation-bits",
}  # of settings that are called otherwise on the command line


class CompareSettings(TypedDict, total=False):
    """Of `qdeploy compare`."""

    arch: str
    arch_args: Mapping[str, Any]
    data_roots: Sequence[PathLike]
    test: PathLike
    test_images: int
    triggers: Sequence[PathLike]
    methods: str
    grids: str
    widths: str
    activation_widths: str
    seeds: int
    steps: int
    calibration: PathLike
    calibration_images: int


class RedteamSettings(TypedDict, total=False):
    """Of `qdeploy redteam make`, where the suite does not say it."""

    data: PathLike  # or digits
    test: PathLike
    base: PathLike
    seed: int


Verb = Literal["sanitize", "gate", "scan", "compare", "redteam"]
SETTINGS: Mapping[Verb, type] = {
    "sanitize": SanitizeSettings,
    "gate": GateSettings,
    "scan": ScanSettings,
    "compare": CompareSettings,
    "redteam": RedteamSettings,
}


def checked(verb: Verb, options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The options as the verb takes them.

    Raises:
        InputError: one is unknown, of another type, or what a fleet decides by itself.
    """
    hints = _hints(verb)
    for key in options:
        if key in OWN:
            raise InputError(
                f"{where}: options.{key} is not for options",
                hint="recipes, policies and devices are lists of the job; reports are made for all",
            )
        if key not in hints:
            meant = get_close_matches(key, hints, n=1)
            raise InputError(
                f"{where}: options.{key}: {verb} has no such option"
                + (f"; is {meant[0]} meant?" if meant else "")
            )
    return {
        key: _typed(value, hints[key], f"{where}: options.{key}") for key, value in options.items()
    }


def filled(options: Mapping[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """The options of one model: placeholders replaced, and paths from where the manifest lies."""
    return {key: _filled(key, value, model, folder) for key, value in options.items()}


def arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """The options as a command line."""
    for key, value in sorted(options.items()):
        flag = f"--{FLAGS.get(key, key).replace('_', '-')}"
        if isinstance(value, bool):
            yield from (flag,) if value else ()
        elif isinstance(value, Mapping):
            for name, said in value.items():
                yield from (flag, f"{name}={_toml(said)}")
        elif key == "input_shape":
            yield from (flag, ",".join(map(str, value)))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for one in value:
                yield from (flag, str(one))
        else:
            yield from (flag, str(value))


@cache
def _hints(verb: Verb) -> dict[str, Any]:
    return get_type_hints(SETTINGS[verb])


def _typed(value: Any, hint: Any, where: str) -> Any:
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        short = "has too few values" if first["type"] == "missing" else first["msg"]
        said = short.replace("Input should be", "must be")
        raise InputError(f"{where}: {said}, not {value!r:.80}") from error


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _filled(key: str, value: Any, model: Path, folder: Path) -> Any:
    if isinstance(value, Mapping | bool | int | float):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_filled(key, one, model, folder) for one in value)
    text = str(value)
    for word, said in zip(PLACEHOLDERS, (model.stem, model.name), strict=True):
        text = text.replace(word, said)
    return located(text, folder) if _is_path(key, text, folder) else text


def _is_path(key: str, text: str, folder: Path) -> bool:
    """Names of what is bundled, patterns of layers and words are none."""
    if key == "data":
        return (folder / text).exists()
    if key == "arch":
        return text.partition(":")[0].endswith(".py")
    if key == "triggers":
        return text.endswith(".toml")
    hint = _path_keys()
    return key in hint


@cache
def _path_keys() -> frozenset[str]:
    """Options that all commands take as paths, or as several."""
    kinds = (PathLike, Sequence[PathLike])
    found = {key for verb in SETTINGS for key, hint in _hints(verb).items() if hint in kinds}
    return frozenset(found - {"triggers", "data"})


def located(text: str, folder: Path) -> str:
    """A path as seen from where the manifest lies, also of a factory `file.py:name`."""
    return str(folder / text)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
