"""Files that are whole or not there, and the directory in which a run keeps what it makes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qdeploy.disk.files import TEMPORARY, write_atomically
from qdeploy.disk.locks import held
from qdeploy.disk.state import sealed, unsealed
from qdeploy.errors import OutputError, UsageError

MANIFEST = "manifest.json"
REPORT = "report.json"
PARTIAL = "partial"
LOCK = ".lock"
UNDER_WAY = "is under way in another process"


@dataclass(frozen=True, slots=True)
class RunDir:
    """`<root>/<run id>/`: everything a run made, with a manifest of sha256 sums."""

    path: Path
    digest: str  # of all that decides about the run: what is kept is of this run and of no other
    written: set[str] = field(default_factory=set)

    def write(self, name: str, data: bytes | memoryview) -> Path:
        """Put a file into the directory; it is in the manifest once `seal` is called."""
        target = self.path / name
        write_atomically(target, data)
        self.written.add(name)
        return target

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def seal(self) -> None:
        """Write the manifest and drop what was kept for resuming: the run is complete."""
        names = sorted(self.written)
        sums = {name: hashlib.sha256(self.read(name)).hexdigest() for name in names}
        self.write(MANIFEST, (json.dumps(sums, indent=2) + "\n").encode())
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)

    @property
    def layers(self) -> StoredLayers:
        return StoredLayers(self.path / PARTIAL / "layers", self.digest)

    @property
    def predictions(self) -> StoredPredictions:
        return StoredPredictions(self.path / PARTIAL / "predictions.npz", self.digest)


@contextmanager
def open_run(root: Path, run_id: str, digest: str | None = None) -> Iterator[RunDir]:
    """The directory of a run, for this process alone while the context is open.

    A run that was interrupted finds what it had; one that was complete starts anew.

    Args:
        digest: Of all that decides about the run, where its name is only the beginning of that.

    Raises:
        OutputError: it cannot be written, or a link or a file of somebody else lies in it.
        UsageError: another process is at the same run.
    """
    path = root / run_id
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(path)
        (path / PARTIAL).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with held(path / LOCK) as ours:
        if not ours:
            raise UsageError(
                f"run {run_id} {UNDER_WAY} ({path})",
                hint="wait for it, or give another --artifacts",
            )
        if (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            shutil.rmtree(path / PARTIAL, ignore_errors=True)
        for torn in _torn_writes(path):
            torn.unlink(missing_ok=True)
        yield RunDir(path, run_id if digest is None else digest)


def _refuse_foreign(folder: Path) -> None:
    """A folder of runs can come with a repository: nothing in it may lead elsewhere.

    Raises:
        OutputError: something in it is a link, or does not belong to this user.
    """
    for path in (folder, *folder.rglob("*")):  # does not follow links
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
            raise OutputError(
                f"run directory {folder}: {path.name} is a link, or not of this user",
                hint="remove the directory, or give another --artifacts",
            )


def _torn_writes(folder: Path) -> list[Path]:
    """What a killed process of ours was writing, under names that nothing reads."""
    return [path for path in folder.rglob(f"{TEMPORARY}*") if path.is_file()]


@dataclass(frozen=True, slots=True)
class StoredLayers:
    """Solved layers of an interrupted run, one file each."""

    folder: Path
    digest: str = ""  # of the run

    def load(self, layer: str) -> dict[str, np.ndarray] | None:
        return _load_arrays(self._file(layer), self.digest)

    def save(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(layer)
        write_atomically(file, _packed(arrays, self.digest, file))

    def _file(self, layer: str) -> Path:
        digest = hashlib.sha256(layer.encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.-]", "_", layer)[:80]
        return self.folder / f"{readable}-{digest}.npz"


@dataclass(frozen=True, slots=True)
class StoredPredictions:
    """The answers an interrupted measurement already has."""

    file: Path
    digest: str = ""

    def load(self) -> tuple[int, dict[str, np.ndarray]] | None:
        arrays = _load_arrays(self.file, self.digest)
        return None if arrays is None else (int(arrays.pop("done")), arrays)

    def save(self, done: int, arrays: Mapping[str, np.ndarray]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.file, _packed({**arrays, "done": np.array(done)}, self.digest, self.file)
        )


def _packed(arrays: Mapping[str, np.ndarray], digest: str, file: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return sealed(buffer.getvalue(), digest, file.name)


def _load_arrays(path: Path, digest: str) -> dict[str, np.ndarray] | None:
    """The arrays in `path`; None if there is no such file, or it was not written by this user."""
    data = unsealed(path, digest, path.name)
    if data is None:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
