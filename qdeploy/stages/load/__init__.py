"""Open a model that nobody vouches for. What a file is decides its content, not its name."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path, PurePosixPath

from qdeploy.errors import InputError
from qdeploy.graph.io import read_untrusted
from qdeploy.model import Architecture, Format, Loaded, Origin

LARGEST_INFLATION_BYTES = 8 << 20  # torch compresses code only, never tensors


def load(
    path: Path, architecture: Architecture | None = None, *, run_code_from_model: bool = False
) -> Loaded:
    """The model in `path`, as far as possible without running anything it contains.

    Args:
        run_code_from_model: Open pickles and exported programs, which can run any code.

    Raises:
        InputError: the file is missing, damaged, makes false claims, needs an architecture, or
            would have to run code.
    """
    if not path.is_file():
        raise InputError(f"model {path}: no such file")
    kind = sniff(path)
    name = architecture.name if architecture else None
    origin = Origin(str(path), sha256(path), kind.value, name)
    if kind is Format.ONNX:
        return Loaded(origin, read_untrusted(path), kind)
    from qdeploy.stages.load import (
        torch_files,
    )  # torch takes a second to import; ONNX needs none of it

    if kind is Format.EXPORTED_PROGRAM:
        if not run_code_from_model:
            raise InputError(
                f"model {path}: is an exported program; loading one can run code from the file",
                hint="export it to ONNX where it was made; if you trust its author, give"
                " --run-code-from-model",
            )
        return Loaded(origin, torch_files.exported_program(path), kind)
    if kind is Format.TORCHSCRIPT:
        return Loaded(origin, torch_files.torchscript(path), kind)
    if kind is Format.SAFETENSORS:
        saved = torch_files.safetensors(path)
    else:
        saved = torch_files.checkpoint(path, unpickle=run_code_from_model)
    return Loaded(origin, torch_files.module_of(saved, path, architecture), kind)


def sniff(path: Path) -> Format:
    """The format of the file's content.

    Raises:
        InputError: it is empty, unreadable or of no known format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"model {path}: {error.strerror}") from error
    if not head:
        raise InputError(f"model {path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return Format.SAFETENSORS
    if (
        head[:1] == b"\x80" and head[1:2] <= b"\x05"
    ):  # pickle protocol marker of torch's older format
        return Format.STATE_DICT
    return Format.ONNX  # a protobuf message has no signature; reading it decides


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sniff_zip(path: Path) -> Format:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"model {path}: damaged or truncated archive: {error}") from error
    claimed, held = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > held + LARGEST_INFLATION_BYTES:
        raise InputError(f"model {path}: {held} bytes that claim to unpack to {claimed}")
    names = [PurePosixPath(entry.filename) for entry in entries]
    if any(name.name == "archive_format" or name.suffix == ".pt2" for name in names) or any(
        name.name in {"serialized_exported_program.json", "model.json"} for name in names
    ):
        return Format.EXPORTED_PROGRAM
    if any(name.name == "constants.pkl" or "code" in name.parts[1:2] for name in names):
        return Format.TORCHSCRIPT
    if any(name.name == "data.pkl" for name in names):
        return Format.STATE_DICT
    raise InputError(
        f"model {path}: a zip archive, but not one that torch wrote",
        hint="expected ONNX, a torch checkpoint, safetensors, TorchScript or .pt2",
    )
