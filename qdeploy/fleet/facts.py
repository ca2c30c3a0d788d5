"""What decides about a cell: digests of the files that it reads, each taken once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qdeploy.disk.files import file_sha256, open_regular
from qdeploy.errors import InputError, QdeployError
from qdeploy.formats.opening import model_digest
from qdeploy.formats.safetensors_index import model_in
from qdeploy.inputs.sources import Sources
from qdeploy.machine import installed_versions
from qdeploy.runs.confined import Confined, Limits
from qdeploy.runs.run_id import input_facts

LIMITS = Limits(seconds=600, memory_bytes=16 << 30)  # of one model's digest, read as a whole
LARGEST_BYTES = 1 << 40  # of what is digested at all: a file, or all of a folder
SMALL_BYTES = 4 << 20  # of files that are read again when a cell has ended
MOST_CODE_FILES = 2000
NO_CODE = frozenset({"site-packages", "node_modules", "__pycache__"})  # and hidden folders


@dataclass(frozen=True, slots=True)
class Input:
    """A file as it was when its cell was called by it."""

    path: Path
    size_bytes: int
    sha256: str

    @property
    def changed(self) -> bool:
        """It is another one now: of a large file only its size is looked at again."""
        try:
            with open_regular(self.path, what="input") as file:
                if os.fstat(file.fileno()).st_size != self.size_bytes:
                    return True
                small = self.size_bytes <= SMALL_BYTES
                return small and hashlib.file_digest(file, "sha256").hexdigest() != self.sha256
        except InputError:
            return True


class Digests:
    """Digests of models and data, by path. Models are read in a process of their own."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}
        self._wholes: dict[Path, str] = {}
        self._files: dict[Path, Input] = {}
        self._read: set[Path] = set()
        self._models = Confined(model_digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._models.stop()

    def taken(self) -> tuple[Input, ...]:
        """The files that were asked about since the last time."""
        read, self._read = self._read, set()
        return tuple(self._files[path] for path in sorted(read) if path in self._files)

    def of(self, path: Path) -> str:
        """Of a file, or of all files in a folder with their names.

        Raises:
            InputError: it cannot be read, or there is too much of it.
        """
        self._read.add(path)
        if path not in self._known:
            try:
                folder = path.is_dir()
            except (OSError, ValueError) as error:
                raise InputError(f"data {path}: {error}") from error
            self._known[path] = _of_folder(path) if folder else self._of_file(path)
        return self._known[path]

    def _of_file(self, path: Path) -> str:
        size = _size(path)
        digest = file_sha256(path, what="data")
        self._files[path] = Input(path, size, digest)
        return digest

    def of_model(self, path: Path) -> list[str]:
        """Of the file, and of all that it computes with.

        Raises:
            InputError: it cannot be read.
        """
        file = model_in(path) if path.is_dir() else path
        digest = self.of(file)
        if file not in self._wholes:
            self._wholes[file] = self._whole(file)
        return [digest, self._wholes[file]]

    def _whole(self, file: Path) -> str:
        try:
            return self._models.do(file, LIMITS, what=f"model {file}")
        except QdeployError as error:
            return str(error)  # the command will say it

    def of_sources(self, sources: Sources) -> dict[str, Any]:
        """The model, how it is read, and the data that goes with it.

        Raises:
            InputError: one of them cannot be read.
        """
        if sources.card_path is not None:
            self.of(sources.card_path)  # its content counts below, as it is understood
        data = {"calibration": sources.calibration, "test": sources.test}
        return {
            "model": self.of_model(sources.model),
            "input": input_facts(sources),
            "data": {role: self.of(one.checked()) for role, one in data.items() if one is not None},
            "triggers": list(self._triggers(sources)),
            "architecture": self._architecture(sources),
        }

    def _triggers(self, sources: Sources) -> Iterator[Any]:
        for spec, place in zip(sources.trigger_specs, sources.trigger_places, strict=True):
            said = spec.model_dump(mode="json")
            named = (said.get(key) for key in ("image", "mask", "pattern", "values"))
            yield said, [self.of(place.file(name)) for name in named if isinstance(name, str)]

    def _architecture(self, sources: Sources) -> Any:
        """The factory, its arguments, and the Python that it is, or that lies beside it."""
        if sources.architecture is None:
            return None
        name, arguments, _ = sources.architecture
        module = name.partition(":")[0]
        if not module.endswith(".py"):
            return name, dict(arguments), installed_versions((module.partition(".")[0],))
        code = [(path.name, self.of(path)) for path in _code_beside(Path(module))]
        return name.rpartition("/")[2], dict(arguments), code

    def of_options(self, options: Mapping[str, Any], *keys: str) -> dict[str, str]:
        """Of the files that options name.

        Raises:
            InputError: one of them cannot be read.
        """
        return {key: self.of(Path(options[key])) for key in keys if key in options}


def _size(path: Path) -> int:
    with open_regular(path, what="data") as file:
        size = os.fstat(file.fileno()).st_size
    if size > LARGEST_BYTES:
        raise InputError(f"data {path}: larger than {LARGEST_BYTES} bytes")
    return size


def _of_folder(folder: Path) -> str:
    digest, total = hashlib.sha256(), 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total += _size(path)
            if total > LARGEST_BYTES:
                raise InputError(f"data {folder}: larger than {LARGEST_BYTES} bytes")
            digest.update(os.fsencode(path.relative_to(folder).as_posix()))
            digest.update(f"\0{file_sha256(path, what='data')}\n".encode())
    if not total:
        raise InputError(f"data {folder}: holds no files")
    return digest.hexdigest()


def _code_beside(file: Path) -> list[Path]:
    """The Python files in the folder of a factory and below it, which it may use."""
    found: list[Path] = []
    for place, folders, names in os.walk(file.parent):
        folders[:] = sorted(x for x in folders if not x.startswith(".") and x not in NO_CODE)
        found += [Path(place, name) for name in sorted(names) if name.endswith(".py")]
        if len(found) > MOST_CODE_FILES:
            raise InputError(
                f"factory {file}: more than {MOST_CODE_FILES} Python files lie beside it",
                hint="put it into a folder of its own, or install it as a package",
            )
    return found
