"""Open a model that nobody vouches for. What a file is decides its content, not its name."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from qdeploy.disk.files import file_sha256, open_regular, read_bounded
from qdeploy.errors import InputError
from qdeploy.formats.known import Format, format_of
from qdeploy.values import Architecture, Loaded, Origin

LARGEST_FILE_BYTES = 16 << 30


def load(
    path: Path,
    architecture: Architecture | None = None,
    *,
    run_code_from_model: bool = False,
    scanned_digest: str | None = None,
) -> Loaded:
    """The model in `path`, as far as possible without running anything it contains.

    Args:
        run_code_from_model: Open pickles and exported programs, which can run any code.
        scanned_digest: The digest that the file had when it was scanned.

    Raises:
        InputError: the file is missing, damaged, makes false claims, needs an architecture, or
            would have to run code, or is another than was looked at.
    """
    if not path.is_file():
        raise InputError(f"model {path}: no such file")
    data = read_bounded(path, LARGEST_FILE_BYTES, what="model")
    row = format_of(io.BytesIO(data), path)
    name = architecture.name if architecture and row.content != "onnx" else None
    digest = hashlib.sha256(data).hexdigest()
    if scanned_digest is not None:
        refuse_exchanged(path, scanned_digest, digest)
    if row.program is not None and not run_code_from_model:
        raise InputError(
            f"model {path}: is {row.program}; loading one runs code from the file",
            hint="export it to ONNX where it was made, or save model.state_dict() and give"
            " --arch; if you trust its author, give --run-code-from-model",
        )
    opened = row.open(path, data, architecture, run_code_from_model)
    origin = Origin(str(path), _digest_of(opened.whole, digest), row.name, name)
    return Loaded(origin, opened.content, row.content)


def sniff(path: Path) -> Format:
    """The format of the file's content.

    Raises:
        InputError: it is empty, unreadable or of no known format.
    """
    with open_regular(path, what="model") as file:
        return format_of(file, path)


def bytes_elsewhere(path: Path) -> int:
    """How many bytes of the model lie in other files; 0 of one that cannot be told."""
    try:
        row = sniff(path)
        return row.held_elsewhere(path) if row.held_elsewhere is not None else 0
    except InputError:
        return 0


def sha256(path: Path) -> str:
    return file_sha256(path, what="model")


def refuse_exchanged(path: Path, scanned_digest: str, used: str) -> None:
    """What was checked is what is used, by the digests of both.

    Raises:
        InputError: it is not.
    """
    if scanned_digest != used:
        raise InputError(f"model {path}: was exchanged or written to while it was read")


def model_digest(path: Path) -> str:
    """`Origin.sha256` of the model at `path`, whatever is wrong with it: the loader says that."""
    try:
        data = read_bounded(path, LARGEST_FILE_BYTES, what="model")
        digest = hashlib.sha256(data).hexdigest()
        row = format_of(io.BytesIO(data), path)
        return _digest_of(row.elsewhere(path, data), digest) if row.elsewhere else digest
    except InputError:
        return ""


def _digest_of(elsewhere: bytes | None, digest: str) -> str:
    """The digest of a model with all that it computes with, in hex.

    That of the file; where tensors lay in other files, the sha256 of the file's digest and of that
    of the model with these tensors in it.
    """
    if elsewhere is None:
        return digest
    return hashlib.sha256(
        f"{digest}\n{hashlib.sha256(elsewhere).hexdigest()}\n".encode()
    ).hexdigest()
