"""The formats of model files, a row each: how to know one, what it must not hold, how to open it.

A format is a module that reads it and a row here.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats import archives, pickles, safetensors_header, safetensors_index
from qdeploy.formats.onnx import rules as onnx_rules
from qdeploy.formats.onnx.external import external_bytes, external_data, load_external
from qdeploy.formats.onnx.reading import (
    LARGEST_MODEL_BYTES,
    keeps_tensors_elsewhere,
    parse_proto,
    read_untrusted,
)
from qdeploy.formats.script_code import file_operations
from qdeploy.machine import require_torch
from qdeploy.messages.encoded import encode
from qdeploy.values import Architecture, Content, Finding


@dataclass(frozen=True, slots=True)
class Glance:
    """What there is to tell a format by."""

    head: bytes  # the first 16
    size: int
    members: tuple[PurePosixPath, ...] | None  # of an archive


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What a file holds."""

    content: Any
    whole: bytes | None = None  # all that it computes with, where that lay in several files


Opener = Callable[[Path, bytes, Architecture | None, bool], Opened]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Format:
    """One format of model files."""

    name: str
    content: Content
    knows: Callable[[Glance], bool]
    rules: Callable[[Path], Iterator[Finding]]  # what stands against one; nothing of it is run
    open: Opener  # from path, bytes, architecture, and whether code in it may run
    texts: Mapping[str, str] = field(default_factory=dict)  # of its rules
    program: str | None = None  # what kind, where to load a file is to run it
    elsewhere: Callable[[Path, bytes], bytes | None] | None = None  # see `Opened.whole`
    held_elsewhere: Callable[[Path], int] | None = None  # bytes of the model in other files
    tensors_alone: bool = False  # so that an architecture must be known


def _onnx_rules(path: Path) -> Iterator[Finding]:
    size = path.stat().st_size
    if size > LARGEST_MODEL_BYTES:
        raise InputError(f"model {path}: larger than {LARGEST_MODEL_BYTES} bytes")
    proto = parse_proto(path.read_bytes(), str(path))
    outside = list(external_data(proto, path))
    yield from outside
    if not any(finding.level == "error" for finding in outside):
        load_external(proto, path)
    yield from onnx_rules.inspect(proto)


def _open_onnx(path: Path, data: bytes, _: Architecture | None, _run: bool) -> Opened:
    proto = read_untrusted(path, data)
    elsewhere = keeps_tensors_elsewhere(data)
    return Opened(proto, encode(proto) if elsewhere else None)


def _external_data(path: Path, data: bytes) -> bytes | None:
    return _open_onnx(path, data, None, False).whole


def _bytes_of_external_data(path: Path) -> int:
    proto = parse_proto(read_bounded(path, LARGEST_MODEL_BYTES, what="model"), str(path))
    return external_bytes(proto, path)


def _pickle_rules(path: Path) -> Iterator[Finding]:
    with path.open("rb") as file:
        data = file.read(pickles.LARGEST_PICKLE_BYTES)
    yield from pickles.examine([pickles.Stream(path.name, data)])


def _archive_rules(program: str | None, path: Path) -> Iterator[Finding]:
    if program is not None:
        text = f"{program} is a program, not tensors alone: to load it is to run it"
        yield Finding("holds-code", "warning", "", text)
    with path.open("rb") as file:
        if program == "TorchScript":
            yield from _script_rules(file)
        yield from pickles.examine(pickles.in_archive(file))


def _script_rules(file: archives.File) -> Iterator[Finding]:
    try:
        with foreign_reader("TorchScript code"), archives.opened(file) as archive:
            found = list(file_operations(archive))
    except InputError as error:
        yield Finding("damaged-code", "error", "", str(error))
        return
    for member, call in found:
        text = f"the TorchScript in {member!r} calls {call}, which no classifier needs"
        yield Finding("file-operation", "error", member, text)


# torch takes a second to import, and may not be there; ONNX needs none of it


def _open_checkpoint(
    path: Path, data: bytes, architecture: Architecture | None, run_code: bool
) -> Opened:
    require_torch(f"model {path}: a torch file")
    from qdeploy.formats import torch_files

    saved = torch_files.checkpoint(path, data, unpickle=run_code)
    return Opened(torch_files.module_of(saved, path, architecture))


def _open_safetensors(
    path: Path, data: bytes, architecture: Architecture | None, _: bool
) -> Opened:
    require_torch(f"model {path}: a torch file")
    from qdeploy.formats import torch_files

    return Opened(torch_files.module_of(torch_files.safetensors(path, data), path, architecture))


def _open_index(path: Path, data: bytes, architecture: Architecture | None, _: bool) -> Opened:
    require_torch(f"model {path}: a torch file")
    from qdeploy.formats import torch_files

    tensors, digests = safetensors_index.load(path, data)
    return Opened(torch_files.module_of(tensors, path, architecture), digests)


def _open_script(path: Path, data: bytes, _: Architecture | None, _run: bool) -> Opened:
    require_torch(f"model {path}: a torch file")
    from qdeploy.formats import torch_files

    return Opened(torch_files.script(path, data))


def _open_program(path: Path, data: bytes, _: Architecture | None, _run: bool) -> Opened:
    require_torch(f"model {path}: a torch file")
    from qdeploy.formats import torch_files

    return Opened(torch_files.exported_program(path, data))


def _is_program(seen: Glance) -> bool:
    described = {"serialized_exported_program.json", "model.json"}
    return any(
        name.name == "archive_format" or name.suffix == ".pt2" or name.name in described
        for name in seen.members or ()
    )


def _is_script(seen: Glance) -> bool:
    names = seen.members or ()
    return any(name.name == "constants.pkl" or "code" in name.parts[1:2] for name in names)


def _is_archive_of_tensors(seen: Glance) -> bool:
    return any(name.name == "data.pkl" for name in seen.members or ())


def _is_safetensors(seen: Glance) -> bool:
    return seen.head[8:9] == b"{" and int.from_bytes(seen.head[:8], "little") <= seen.size


def _is_index(seen: Glance) -> bool:
    """JSON, which no other of the formats begins like."""
    return seen.head.lstrip()[:1] == b"{"


def _is_pickle(seen: Glance) -> bool:
    """By the protocol marker of torch's older format."""
    return seen.head[:1] == b"\x80" and seen.head[1:2] <= b"\x05"


CODE_TEXTS = {
    "holds-code": "The file is a program: loading it runs code from it.",
    "damaged-code": "TorchScript code cannot be read.",
    "file-operation": "TorchScript code reads or writes files, or calls foreign operators.",
}


def _is_ort_format(seen: Glance) -> bool:
    """By the identifier of its flatbuffer."""
    return seen.head[4:8] == b"ORTM"


def _refuse_ort_format(path: Path, *_: object) -> Any:
    raise InputError(
        f"model {path}: ORT format, a graph that onnxruntime has rewritten: it cannot be compared",
        hint="give the ONNX file that it was made from; --format ort writes and measures its own",
    )


# The first that knows a file is its format. A protobuf message has no signature: reading decides.
ROWS = (
    Format(
        name="ORT format", content="onnx", knows=_is_ort_format, rules=_refuse_ort_format,
        open=_refuse_ort_format,
    ),
    Format(
        name="exported program (.pt2)", content="program", program="an exported program",
        knows=_is_program, rules=partial(_archive_rules, "an exported program"), open=_open_program,
    ),
    Format(
        name="TorchScript", content="script", program="TorchScript", knows=_is_script,
        rules=partial(_archive_rules, "TorchScript"), open=_open_script, texts=CODE_TEXTS,
    ),
    Format(
        name="torch checkpoint", content="module", tensors_alone=True, knows=_is_archive_of_tensors,
        rules=partial(_archive_rules, None), open=_open_checkpoint, texts=pickles.RULES,
    ),
    Format(
        name="safetensors", content="module", tensors_alone=True, knows=_is_safetensors,
        rules=safetensors_header.findings_in_header, open=_open_safetensors,
        texts=safetensors_header.RULES,
    ),
    Format(
        name="safetensors in parts", content="module", tensors_alone=True, knows=_is_index,
        rules=safetensors_index.findings, open=_open_index, texts=safetensors_index.RULES,
        elsewhere=safetensors_index.digests, held_elsewhere=safetensors_index.held_elsewhere,
    ),
    Format(
        name="torch checkpoint", content="module", tensors_alone=True, knows=_is_pickle,
        rules=_pickle_rules, open=_open_checkpoint,
    ),
    Format(
        name="ONNX", content="onnx", knows=lambda seen: seen.members is None, rules=_onnx_rules,
        open=_open_onnx, texts=onnx_rules.RULES, elsewhere=_external_data,
        held_elsewhere=_bytes_of_external_data,
    ),
)  # fmt: skip


def format_of(file: archives.File, path: Path) -> Format:
    """The format of what `file` holds; `path` is for the error.

    Raises:
        InputError: it is empty, unreadable or of no known format.
    """
    seen = _glance(file, path)
    for row in ROWS:
        if row.knows(seen):
            return row
    raise InputError(
        f"model {path}: a zip archive, but not one that torch wrote",
        hint="expected ONNX, a torch checkpoint, safetensors, TorchScript or .pt2",
    )


def _glance(file: archives.File, path: Path) -> Glance:
    file.seek(0)
    head = file.read(16)
    size = file.seek(0, 2)
    if not head:
        raise InputError(f"model {path}: is empty")
    members = _members(file, size, path) if head.startswith(archives.SIGNATURE) else None
    return Glance(head, size, members)


def _members(file: archives.File, held: int, path: Path) -> tuple[PurePosixPath, ...]:
    """Names of what an archive holds."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"model {path}: damaged or truncated archive: {error}") from error
    claimed = sum(entry.file_size for entry in entries)
    if claimed > held + archives.LARGEST_INFLATION_BYTES:
        raise InputError(f"model {path}: {held} bytes that claim to unpack to {claimed}")
    return tuple(PurePosixPath(entry.filename) for entry in entries)
