"""What decides about a cell: digests of the files that it reads, each taken once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from qdeploy.disk.files import file_sha256
from qdeploy.errors import InputError, QdeployError
from qdeploy.formats.opening import model_digest
from qdeploy.formats.safetensors_index import model_in
from qdeploy.inputs.sources import Sources
from qdeploy.runs.confined import Confined, Limits
from qdeploy.runs.run_id import input_facts

LIMITS = Limits(seconds=600, memory_bytes=16 << 30)  # of one model's digest, read as a whole


class Digests:
    """Digests of models and data, by path. Models are read in a process of their own."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}
        self._models = Confined(model_digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._models.stop()

    def of(self, path: Path) -> str:
        """Of a file, or of all files in a folder with their names.

        Raises:
            InputError: it cannot be read.
        """
        if path not in self._known:
            self._known[path] = (
                _of_folder(path) if path.is_dir() else file_sha256(path, what="data")
            )
        return self._known[path]

    def of_model(self, path: Path) -> list[str]:
        """Of the file, and of all that it computes with.

        Raises:
            InputError: it cannot be read.
        """
        file = model_in(path) if path.is_dir() else path
        whole = file.with_name(f"{file.name}\0whole")
        if whole not in self._known:
            self._known[whole] = self._whole(file)
        return [self.of(file), self._known[whole]]

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
        """The factory and its arguments; of one in a file all Python beside it too."""
        if sources.architecture is None:
            return None
        name, arguments, _ = sources.architecture
        file = Path(name.partition(":")[0])
        code = sorted(file.parent.glob("*.py")) if file.suffix == ".py" else []
        return name.rpartition("/")[2], dict(arguments), [self.of(one) for one in code]

    def of_options(self, options: Mapping[str, Any], *keys: str) -> dict[str, str]:
        """Of the files that options name.

        Raises:
            InputError: one of them cannot be read.
        """
        return {key: self.of(Path(options[key])) for key in keys if key in options}


def _of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            one = file_sha256(path, what="data")
            digest.update(f"{path.relative_to(folder).as_posix()}\0{one}\n".encode())
    if digest.digest() == hashlib.sha256().digest():
        raise InputError(f"data {folder}: holds no files")
    return digest.hexdigest()
