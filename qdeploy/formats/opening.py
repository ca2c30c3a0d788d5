"""Open a model that nobody vouches for. What a file is decides its content, not its name."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path, PurePosixPath

from qdeploy.disk.files import file_sha256, open_regular, read_bounded
from qdeploy.errors import InputError
from qdeploy.formats.onnx.reading import ModelProto, keeps_tensors_elsewhere, read_untrusted
from qdeploy.values import Architecture, Format, Loaded, Origin

LARGEST_FILE_BYTES = 16 << 30
PROGRAMS = {Format.EXPORTED_PROGRAM: "an exported program", Format.TORCHSCRIPT: "TorchScript"}
LARGEST_INFLATION_BYTES = 8 << 20  # torch compresses code only, never tensors


def load(
    path: Path,
    architecture: Architecture | None = None,
    *,
    run_code_from_model: bool = False,
    looked_at: str | None = None,
) -> Loaded:
    """The model in `path`, as far as possible without running anything it contains.

    Args:
        run_code_from_model: Open pickles and exported programs, which can run any code.
        looked_at: The digest that the file had when it was scanned.

    Raises:
        InputError: the file is missing, damaged, makes false claims, needs an architecture, or
            would have to run code, or is another than was looked at.
    """
    if not path.is_file():
        raise InputError(f"model {path}: no such file")
    data = read_bounded(path, LARGEST_FILE_BYTES, what="model")
    kind = kind_of(io.BytesIO(data), path)
    name = architecture.name if architecture else None
    digest = hashlib.sha256(data).hexdigest()
    if looked_at is not None:
        refuse_exchanged(path, looked_at, digest)
    if kind is Format.ONNX:
        proto = read_untrusted(path, data)
        return Loaded(
            Origin(str(path), with_external(digest, proto, data), kind.value), proto, kind
        )
    origin = Origin(str(path), digest, kind.value, name)
    from qdeploy.formats import torch_files

    if kind in PROGRAMS:
        if not run_code_from_model:
            raise InputError(
                f"model {path}: is {PROGRAMS[kind]}; loading one runs code from the file",
                hint="export it to ONNX where it was made, or save model.state_dict() and give"
                " --arch; if you trust its author, give --run-code-from-model",
            )
        opened = torch_files.program(path, data, kind)
        return Loaded(origin, opened, kind)
    if kind is Format.SAFETENSORS:
        saved = torch_files.safetensors(path, data)
    else:
        saved = torch_files.checkpoint(path, data, unpickle=run_code_from_model)
    return Loaded(origin, torch_files.module_of(saved, path, architecture), kind)


def sniff(path: Path) -> Format:
    """The format of the file's content.

    Raises:
        InputError: it is empty, unreadable or of no known format.
    """
    with open_regular(path, what="model") as file:
        return kind_of(file, path)


def kind_of(file: io.BufferedReader | io.BytesIO, path: Path) -> Format:
    """The format of what `file` holds; `path` is for the error.

    Raises:
        InputError: it is empty, unreadable or of no known format.
    """
    head = file.read(16)
    size = file.seek(0, io.SEEK_END)
    if not head:
        raise InputError(f"model {path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(file, size, path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return Format.SAFETENSORS
    if (
        head[:1] == b"\x80" and head[1:2] <= b"\x05"
    ):  # pickle protocol marker of torch's older format
        return Format.STATE_DICT
    return Format.ONNX  # a protobuf message has no signature; reading it decides


def sha256(path: Path) -> str:
    return file_sha256(path, what="model")


def refuse_exchanged(path: Path, looked_at: str, used: str) -> None:
    """What was checked is what is used, by the digests of both.

    Raises:
        InputError: it is not.
    """
    if looked_at != used:
        raise InputError(f"model {path}: was exchanged or written to while it was read")


def model_digest(path: Path) -> str:
    """`Origin.sha256` of the model at `path`, whatever is wrong with it: the loader says that."""
    try:
        data = read_bounded(path, LARGEST_FILE_BYTES, what="model")
        digest = hashlib.sha256(data).hexdigest()
        if kind_of(io.BytesIO(data), path) is not Format.ONNX:
            return digest
        return with_external(digest, read_untrusted(path, data), data)
    except InputError:
        return ""


def with_external(digest: str, proto: ModelProto, data: bytes) -> str:
    """The digest of a model with all that it computes with, in hex.

    That of the file; where tensors lay in other files, the sha256 of the file's digest and of that
    of the model with these tensors in it.
    """
    if not keeps_tensors_elsewhere(data):
        return digest
    whole = proto.SerializeToString(deterministic=True)
    return hashlib.sha256(f"{digest}\n{hashlib.sha256(whole).hexdigest()}\n".encode()).hexdigest()


def _sniff_zip(file: io.BufferedReader | io.BytesIO, held: int, path: Path) -> Format:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"model {path}: damaged or truncated archive: {error}") from error
    claimed = sum(entry.file_size for entry in entries)
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
