"""The zip archives that torch writes, as they lie on disk: what readers could take differently.

Every member is described twice, in front of its data and in the directory at the end, and readers
choose. torch writes the same in both, stores all but code uncompressed, and leaves no byte
unaccounted for: padding is in extra fields, filled with the letter Z.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from qdeploy.errors import InputError, foreign_reader
from qdeploy.values import Finding

RULES = {
    "duplicate-member": "Members of the archive share a name, so readers may take either.",
    "path-traversal": "A member's name leads out of the folder it is unpacked into.",
    "encrypted-member": "A member is encrypted, so nobody can look at it.",
    "symlink-member": "A member is a symbolic link.",
    "inflation": "The archive unpacks to far more than it holds.",
    "unknown-compression": "A member is compressed in a way that torch does not read.",
    "header-mismatch": "A member's header says other things than the archive's directory.",
    "overlapping-members": "Members of the archive share bytes.",
    "hidden-bytes": "The file holds bytes that belong to no part of it.",
    "unexpected-member": "The archive holds a program, where only tensors and their code belong.",
    "deep-archive": "Archives inside of archives, deeper than anything is looked at.",
}
File = io.BufferedReader | io.BytesIO
LARGEST_INFLATION_BYTES = 8 << 20  # torch compresses code only, never tensors
DEPTH = 2  # archives in an archive: exported programs hold torch files
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END_RECORD_BYTES = 22
SIGNATURE = b"PK\x03\x04"
DESCRIBED_BEHIND = 0x08  # flag: sizes follow the data
LARGEST_DESCRIPTOR_BYTES = 24
WIDE = 0xFFFFFFFF  # a size that stands elsewhere
LARGEST_EXTRA_BYTES = 64  # time stamps and sizes; torch's padding does not count
PADDING = 0x4246
PROGRAMS = frozenset({
    ".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".js", ".jar",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Local:
    """What stands in front of a member's data."""

    flags: int
    method: int
    sizes: tuple[int, int]
    name: bytes
    extra: bytes
    length: int  # of the header


def archives(file: File, where: str = "", depth: int = DEPTH) -> Iterator[tuple[str, File | None]]:
    """The archive itself, and those among its members, each with its place.

    Nothing is unpacked of an archive that claims to inflate beyond reason. Of what lies too deep
    there is only the place.

    Raises:
        InputError: `file` is no zip archive.
    """
    with opened(file, where) as archive:
        yield where, file
        if inflated(file, archive):
            return
        for entry in archive.infolist():
            inner = f"{where}{entry.filename}/"
            data = _archive_in(archive, entry)
            if data is not None and depth:
                yield from archives(io.BytesIO(data), inner, depth - 1)
            elif data is not None:
                yield inner, None


def _archive_in(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes | None:
    """The archive that a member is; None if it is none, or cannot be read."""
    try:
        with foreign_reader(entry.filename), archive.open(entry) as member:
            head = member.read(len(SIGNATURE))
            data = head + member.read() if head == SIGNATURE else None
    except InputError:
        return None  # `findings_in_archive` says what is wrong with the member
    return data if data is not None and is_archive(data) else None


def is_archive(data: bytes) -> bool:
    try:
        opened(io.BytesIO(data)).close()
    except InputError:
        return False
    return True


def opened(file: File, where: str = "") -> zipfile.ZipFile:
    """The archive in `file`.

    Raises:
        InputError: it is none, or damaged.
    """
    file.seek(0)
    with foreign_reader(f"damaged or truncated archive {where}".rstrip()):
        return zipfile.ZipFile(file)


def findings_in_archive(file: File, where: str = "") -> Iterator[Finding]:
    """Everything that is odd about one archive; `where` is put before the names of its members.

    Raises:
        InputError: `file` is no zip archive.
    """
    with opened(file, where) as archive:
        entries = archive.infolist()
        for entry in entries:
            for rule, text in _of_member(entry):
                name = where + entry.orig_filename
                yield Finding(rule, "error", name, f"member {name!r} {text}")
        for name, count in Counter(entry.filename.casefold() for entry in entries).items():
            if count > 1:
                text = f"{count} members are called {where + name!r}"
                yield Finding("duplicate-member", "error", where + name, text)
        size = inflated(file, archive)
        if size:
            text = f"an archive that claims to unpack to {size} bytes"
            yield Finding("inflation", "error", where, text)
        yield from _bytes(file, archive, where)


def inflated(file: File, archive: zipfile.ZipFile) -> int:
    """The bytes an archive claims to unpack to, if that is far more than it holds; else 0."""
    claimed = sum(entry.file_size for entry in archive.infolist())
    return claimed if claimed > file.seek(0, io.SEEK_END) + LARGEST_INFLATION_BYTES else 0


def _of_member(entry: zipfile.ZipInfo) -> Iterator[tuple[str, str]]:
    """What the directory's entry alone tells."""
    name = entry.orig_filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or name[1:2] == ":":
        yield "path-traversal", "has a name that leads out of a folder"
    if entry.flag_bits & 0x41:
        yield "encrypted-member", "is encrypted"
    if stat.S_ISLNK(entry.external_attr >> 16):
        yield "symlink-member", "is a symbolic link"
    if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        yield "unknown-compression", f"is compressed by method {entry.compress_type}"
    if path.suffix.lower() in PROGRAMS and not (path.suffix == ".py" and "code" in path.parts[1:2]):
        yield "unexpected-member", "is a program, which no state dict or network needs"


def _bytes(file: File, archive: zipfile.ZipFile, where: str) -> Iterator[Finding]:
    """Follow the file from its first byte to its last."""
    spans = []
    for entry in archive.infolist():
        name = where + entry.orig_filename
        local = _local(file, entry)
        if local is None:
            text = f"member {name!r} has no header in front of its data"
            yield Finding("header-mismatch", "error", name, text)
            continue
        for what in _differences(local, entry):
            text = f"member {name!r} has another {what} in its header than in the directory"
            yield Finding("header-mismatch", "error", name, text)
        if _unpadded(local.extra) > LARGEST_EXTRA_BYTES:
            text = f"member {name!r} has data in its header's padding"
            yield Finding("hidden-bytes", "error", name, text)
        end = entry.header_offset + local.length + entry.compress_size
        slack = LARGEST_DESCRIPTOR_BYTES if local.flags & DESCRIBED_BEHIND else 0
        spans.append((entry.header_offset, end, slack, name))
    yield from _around(file, archive, sorted(spans), where)


def _around(
    file: File, archive: zipfile.ZipFile, spans: list[tuple[int, int, int, str]], where: str
) -> Iterator[Finding]:
    """Bytes before, between and behind the members."""
    directory = archive.start_dir
    bounds = [(0, 0, 0, where), *spans, (directory, directory, 0, where)]
    for (_, end, slack, _), (start, _, _, name) in pairwise(bounds):
        if start < end:
            text = f"member {name!r} begins inside of the one before it"
            yield Finding("overlapping-members", "error", name, text)
        elif start - end > slack:
            text = f"{start - end} bytes before {name or 'the directory'!r} belong to no member"
            yield Finding("hidden-bytes", "error", name, text)
    rest = _behind(file, directory)
    if rest:
        yield Finding("hidden-bytes", "error", where, f"{rest} bytes behind the end record")


def _local(file: File, entry: zipfile.ZipInfo) -> _Local | None:
    file.seek(max(entry.header_offset, 0))
    head = file.read(LOCAL_HEADER.size)
    if len(head) < LOCAL_HEADER.size or head[:4] != SIGNATURE:
        return None
    fields = LOCAL_HEADER.unpack(head)
    name, extra = file.read(fields[9]), file.read(fields[10])
    length = LOCAL_HEADER.size + fields[9] + fields[10]
    return _Local(fields[2], fields[3], (fields[7], fields[8]), name, extra, length)


def _differences(local: _Local, entry: zipfile.ZipInfo) -> Iterator[str]:
    if local.name.decode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace") != (
        entry.orig_filename
    ) or entry.filename != entry.orig_filename.replace("\\", "/"):
        yield "name"
    if local.method != entry.compress_type:
        yield "compression"
    said = (entry.compress_size, entry.file_size)
    unsaid = {WIDE, 0} if local.flags & DESCRIBED_BEHIND else {WIDE}
    if any(a != b and a not in unsaid for a, b in zip(local.sizes, said, strict=True)):
        yield "size"
    if entry.compress_type == zipfile.ZIP_STORED and said[0] != said[1]:
        yield "size"
    if (local.flags ^ entry.flag_bits) & 0x41:
        yield "encryption"


def _unpadded(extra: bytes) -> int:
    """Bytes of an extra field that are not torch's padding."""
    count = at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        content = extra[at + 4 : at + 4 + size]
        if kind != PADDING or content.strip(b"Z"):
            count += 4 + len(content)
        at += 4 + size
    return count


def _behind(file: File, directory: int) -> int:
    """Bytes behind the end record; a comment there is no part of a model."""
    size = file.seek(0, io.SEEK_END)
    file.seek(directory)
    at = directory + file.read().rfind(b"PK\x05\x06")
    return size - at - END_RECORD_BYTES
