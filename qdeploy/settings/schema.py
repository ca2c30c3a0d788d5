"""TOML files as frozen models: every key known, every error one line with the key's path."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LARGEST_FILE_BYTES = 1 << 20
LONGEST_SHOWN = 80  # characters of a wrong value
NOUNS = {
    "recipes": "recipe",
    "recipes/redteam": "attack",
    "recipes/suites": "suite",
    "recipes/policies": "policy",
    "devices": "device",
}


class Spec(BaseModel):
    """Base of everything read from TOML: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SpecType = TypeVar("SpecType", bound=Spec)
ModelType = TypeVar("ModelType", bound=BaseModel)


def load_toml(path: Path, model: type[SpecType], *, what: str) -> SpecType:
    """The TOML file at `path` as a `model`.

    Raises:
        InputError: it cannot be read, is not TOML, or does not fit the model.
    """
    data = read_bounded(path, LARGEST_FILE_BYTES, what=what)
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{what} {path}: not valid TOML: {error}") from error
    return validate(table, model, where=f"{what} {path}")


def validate(table: object, model: type[ModelType], *, where: str) -> ModelType:
    """`table` as a `model`; `where` begins the error message.

    Raises:
        InputError: a key is unknown or missing, or a value is out of bounds.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        lines = (_said(found, model) for found in error.errors(include_url=False))
        raise InputError(f"{where}: " + "; ".join(lines)) from error


def _said(found: ErrorDetails, model: type[BaseModel]) -> str:
    """What is wrong with one key, and the key that may have been meant."""
    loc, message = found["loc"], found["msg"]
    key = ".".join(map(str, loc)) or "file"
    if found["type"] == "missing":
        return f"{key}: is missing"
    if found["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        meant = get_close_matches(str(loc[-1]), known, n=1)
        return f"{key}: there is no such key" + (f"; is {meant[0]} meant?" if meant else "")
    plain = message.removeprefix("Value error, ").replace("Input should be", "must be")
    given = found["input"]
    shown = (
        f", not {given!r}" if isinstance(given, str | int | float) and len(str(given)) < 80 else ""
    )
    return f"{key}: {plain}" + (shown if plain.startswith("must be") else "")


def _keys_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that a table may have, by where it lies; those of all its kinds, if it has some."""
    models = [model]
    for step in loc:
        fields = [m.model_fields[step] for m in models if step in m.model_fields]
        if fields:  # else a place in an array, or the name of a kind
            models = [m for field in fields for m in _models_in(field.annotation)]
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def bundled(kind: str) -> dict[str, Path]:
    """The TOML files of `kind` that come with qdeploy, by name.

    Kinds are the folders that `NOUNS` names.
    """
    package = Path(__file__).parents[1]
    installed, checkout = package / kind, package.parent / kind
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_bundled(kind: str, name_or_path: str) -> Path:
    """The file that `name_or_path` means: a path that exists, else the name of a bundled one.

    Raises:
        UsageError: it is neither.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return Path(name_or_path)
    known = bundled(kind)
    if name_or_path not in known:
        raise UsageError(
            f"no {NOUNS[kind]} is called {name_or_path!r}",
            hint=f"have {', '.join(known)}; or give a path that ends in .toml",
        )
    return known[name_or_path]
