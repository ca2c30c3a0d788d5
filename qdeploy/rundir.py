"""Files that are whole or not there, and the directory in which a run keeps what it makes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.disk import write_atomically
from qdeploy.errors import OutputError, UsageError

MANIFEST = "manifest.json"
REPORT = "report.json"
PARTIAL = "partial"
LOCK = ".lock"
SEED_KEY = "seed.key"


def private_seed(root: Path, model: Path) -> int:
    """A seed for `model` that nobody outside can foresee, and that stays the same here.

    It is a hash of the model file and of a key in `root`, which is drawn once. A report that is
    published gives away the seed of its own model and of no other.

    Raises:
        OutputError: the key cannot be written.
    """
    path = root / SEED_KEY
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root) as file:  # for its owner alone
            file.write(secrets.token_bytes(32))
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
        key = path.read_bytes()
        content = model.read_bytes() if model.is_file() else b""  # the loader says what is wrong
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    digest = hashlib.sha256(key + hashlib.sha256(content).digest()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class RunDir:
    """`<root>/<run id>/`: everything a run made, with a manifest of sha256 sums."""

    path: Path

    def write(self, name: str, data: bytes) -> Path:
        """Put a file into the directory; it is in the manifest once `seal` is called."""
        target = self.path / name
        write_atomically(target, data)
        return target

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def seal(self) -> None:
        """Write the manifest and drop what was kept for resuming: the run is complete."""
        files = sorted(
            p for p in self.path.iterdir() if p.is_file() and p.name not in {MANIFEST, LOCK}
        )
        sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        self.write(MANIFEST, (json.dumps(sums, indent=2) + "\n").encode())
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)

    @property
    def layers(self) -> StoredLayers:
        return StoredLayers(self.path / PARTIAL / "layers")

    @property
    def predictions(self) -> StoredPredictions:
        return StoredPredictions(self.path / PARTIAL / "predictions.npz")


@contextmanager
def open_run(root: Path, run_id: str) -> Iterator[RunDir]:
    """The directory of a run, for this process alone while the context is open.

    A run that was interrupted finds what it had; one that was complete starts anew.

    Raises:
        OutputError: it cannot be written.
        UsageError: another process is at the same run.
    """
    path = root / run_id
    try:
        (path / PARTIAL).mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("w")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"run {run_id} is under way in another process ({path})",
                hint="wait for it, or give another --artifacts",
            ) from error
        if (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            shutil.rmtree(path / PARTIAL, ignore_errors=True)
        for torn in _torn_writes(path):
            torn.unlink(missing_ok=True)
        yield RunDir(path)


def _torn_writes(folder: Path) -> list[Path]:
    """What a killed process was writing, under names that nothing reads."""
    return [p for p in folder.rglob(".*") if p.is_file() and p.name != LOCK]


@dataclass(frozen=True, slots=True)
class StoredLayers:
    """Solved layers of an interrupted run, one file each."""

    folder: Path

    def load(self, layer: str) -> dict[str, np.ndarray] | None:
        return _load_arrays(self._file(layer))

    def save(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(layer), _packed(arrays))

    def _file(self, layer: str) -> Path:
        digest = hashlib.sha256(layer.encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.-]", "_", layer)[:80]
        return self.folder / f"{readable}-{digest}.npz"


@dataclass(frozen=True, slots=True)
class StoredPredictions:
    """The answers an interrupted measurement already has."""

    file: Path

    def load(self) -> tuple[int, dict[str, np.ndarray]] | None:
        arrays = _load_arrays(self.file)
        return None if arrays is None else (int(arrays.pop("done")), arrays)

    def save(self, done: int, arrays: Mapping[str, np.ndarray]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, _packed({**arrays, "done": np.array(done)}))


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays in `path`; None if there is no such file or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError):
        return None
