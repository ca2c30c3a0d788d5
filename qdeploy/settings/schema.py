"""TOML files as frozen models: every key known, every error one line with the key's path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, UsageError

LARGEST_FILE_BYTES = 1 << 20
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
        lines = (f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise InputError(f"{where}: " + "; ".join(lines)) from error


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
