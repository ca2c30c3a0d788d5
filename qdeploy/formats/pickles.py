"""What unpickling would import, found by reading the opcodes. Nothing here is ever unpickled.

A pickle is a program. The one in a state dict calls a handful of torch's functions that build
tensors; everything else it could import is code that runs when the file is loaded.
"""

from __future__ import annotations

import ast
import contextlib
import io
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePosixPath
from typing import Literal

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats.archives import File, archives, is_archive, opened
from qdeploy.values import Finding

RULES = {
    "pickle-import": "Loading the file would import something that no tensor needs.",
    "pickle-odd": "A pickle is put together in a way that picklers do not.",
    "pickle-damaged": "A pickle cannot be followed to its end.",
    "pickle-not-examined": "Pickles were not examined, for lack of the engine or for their size.",
    "script-classes": "A pickle names classes of the file's own TorchScript code.",
}
LARGEST_PICKLE_BYTES = 1 << 26
MOST_OPCODES = 1_000_000  # what fickling follows too
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's older format; four follow
LEGACY_PICKLES = 5
UNEXAMINED = "pickles were not examined; pip install 'qdeploy[scan]'"
PICKLED = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"})
TOLERATED = re.compile(
    r"""collections\.(OrderedDict|Counter)
    | (builtins|__builtin__)\.(set|bytearray|complex) | _codecs\.encode
    | torch\.(cuda\.)?[A-Z]\w*Storage | torch\.storage\.(Typed|Untyped)Storage
    | torch\.(cuda\.)?(sparse\.)?[A-Z]\w*Tensor | torch\.(Tensor|Size|device)
    | torch\.(bool|bfloat16|float\d\w*|complex\d+|u?int\d+|qu?int\d\w*|bits\d\w*)
    | torch\.per_(tensor|channel)_(affine|symmetric|affine_float_qparams)
    | torch\.nn\.parameter\.Parameter | torch\.serialization\._get_layout
    | torch\._utils\._rebuild_(parameter|parameter_with_state|qtensor|tensor|tensor_v2|tensor_v3
        |sparse_tensor|meta_tensor_no_storage|nested_tensor|wrapper_subclass
        |device_tensor_from_numpy|device_tensor_from_cpu_tensor)
    | torch\._tensor\._rebuild_from_type_v2
    | numpy\.(dtype|ndarray) | numpy\.(_?core)\.multiarray\.(scalar|_reconstruct)""",
    re.VERBOSE,
)  # what torch's own restricted unpickler knows, and numpy's arrays
SCRIPT = re.compile(r"torch\.jit\._pickle\.(build_\w+list|build_tensor_from_id|restore_type_tag)")
SCRIPT_CLASS = "__torch__."
OWN_NAMES = frozenset({"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})  # whose names are computed


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes that begin with a pickle."""

    where: str
    data: bytes
    script: bool = False  # read by TorchScript's own reader, which imports nothing


@dataclass(frozen=True, slots=True)
class _Opcodes:
    """What can be read off the opcodes without following them."""

    imports: frozenset[str]
    computed: bool  # there are imports whose names are not written out
    count: int
    first_number: object
    end: int


def in_archive(file: File) -> Iterator[Stream]:
    """The pickles among the members of a torch file, and of the torch files inside of it.

    Raises:
        InputError: `file` is no zip archive.
    """
    for where, part in archives(file):
        if part is None:
            continue
        with opened(part, where) as archive:
            names = archive.namelist()
            script = any(PurePosixPath(name).name == "constants.pkl" for name in names)
            for entry in archive.infolist():
                data = _pickle(archive, entry)
                if data is not None:
                    yield Stream(where + entry.filename, data, script)


def _pickle(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes | None:
    path = PurePosixPath(entry.filename)
    if path.suffix.lower() not in PICKLED and not entry.filename.endswith("_pkl"):
        return None
    try:
        with foreign_reader(entry.filename), archive.open(entry) as member:
            data = member.read(LARGEST_PICKLE_BYTES + 1)
    except InputError:
        return b""
    return None if is_archive(data) else data


def examine(streams: Iterable[Stream]) -> Iterator[Finding]:
    """What stands against the pickles, by their opcodes and by fickling's reading of them."""
    try:
        import_module("fickling")
    except ImportError:
        yield Finding("pickle-not-examined", "warning", "", UNEXAMINED)
        return
    for stream in streams:
        if len(stream.data) > LARGEST_PICKLE_BYTES:
            text = f"pickle {stream.where!r} is larger than {LARGEST_PICKLE_BYTES} bytes"
            yield Finding("pickle-not-examined", "warning", stream.where, text)
        yield from _stream(stream)


def _stream(stream: Stream) -> Iterator[Finding]:
    """The pickles that follow each other in a stream: one, or those of torch's older format."""
    file = io.BytesIO(stream.data)
    left = 1
    legacy = False
    while left:
        start = file.tell()
        opcodes = _opcodes(file)
        if opcodes.first_number == LEGACY_MAGIC and not legacy:
            legacy, left = True, LEGACY_PICKLES
        yield from _one(Stream(stream.where, stream.data[start:], stream.script), opcodes)
        left = left - 1 if opcodes.end else 0
        file.seek(opcodes.end)
    if not legacy and opcodes.end and file.read(1):
        text = f"{len(stream.data) - opcodes.end} bytes follow the pickle {stream.where!r}"
        yield Finding("pickle-odd", "warning", stream.where, text)


def _opcodes(file: io.BytesIO) -> _Opcodes:
    """Read opcodes up to the end of a pickle; `end` is 0 if that is never reached."""
    imports, computed, count, number, end = set(), False, 0, None, 0
    with contextlib.suppress(InputError), foreign_reader(""):
        for opcode, argument, _ in pickletools.genops(file):
            count += 1
            if opcode.name in {"GLOBAL", "INST"}:
                imports.add(str(argument).replace(" ", ".", 1))
            computed |= opcode.name in OWN_NAMES
            number = argument if count <= 2 and isinstance(argument, int) else number
            if count > MOST_OPCODES:
                break
        else:
            end = file.tell()
    return _Opcodes(frozenset(imports), computed, count, number, end)


def _follow(data: bytes) -> tuple[set[str], str | None]:
    """What fickling sees imported, and where it gives up, if it does."""
    from fickling.fickle import Interpreter, Pickled

    interpreter = Interpreter(Pickled.load(io.BytesIO(data), fail_on_decode_error=False))
    failure = None
    try:
        with foreign_reader("fickling"):
            interpreter.run()
    except InputError as error:
        failure = str(error)
    imports = set()
    for statement in interpreter.module_body:
        if isinstance(statement, ast.ImportFrom):
            imports |= {f"{statement.module}.{alias.name}" for alias in statement.names}
        elif isinstance(statement, ast.Import):
            imports |= {alias.name for alias in statement.names}
    return imports, failure


def _oddities(data: bytes) -> list[tuple[Literal["error", "warning"], str]]:
    """What else fickling minds.

    Of its analyses, those of imports are left out, as `TOLERATED` is stricter, and those that
    write calls out as text: shared arguments can make such a text as long as they like.
    """
    from fickling import analysis, fickle

    analyses = (
        analysis.DuplicateProtoAnalysis(), analysis.MisplacedProtoAnalysis(),
        analysis.ResourceExhaustionAnalysis(), analysis.ExpansionAttackAnalysis(),
        analysis.ScannerDeactivation(),
    )  # fmt: skip
    pickled = fickle.Pickled.load(io.BytesIO(data), fail_on_decode_error=False)
    found = analysis.Analyzer(analyses).analyze(pickled).results
    malicious = analysis.Severity.LIKELY_OVERTLY_MALICIOUS
    return [
        (
            "error" if result.severity >= malicious else "warning",
            " ".join(str(result).split())[:200],
        )
        for result in found
        if result.severity >= analysis.Severity.LIKELY_UNSAFE
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence fickling, which prints about malformed pickles, quoting them."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _one(stream: Stream, opcodes: _Opcodes) -> Iterator[Finding]:
    where, odd, imports = stream.where, [], set(opcodes.imports)
    if opcodes.count > MOST_OPCODES:
        failure: str | None = f"it has more than {MOST_OPCODES} opcodes"
    else:
        failure = None if opcodes.end else "it has no end"
        try:
            with _quiet(), foreign_reader(""):
                followed, failed = _follow(stream.data)
                odd = _oddities(stream.data)
            imports |= followed
            failure = failure or failed
        except InputError as error:
            failure = str(error).removeprefix(": ")
    if failure is not None:
        hidden = opcodes.computed or not opcodes.count
        text = f"pickle {where!r} cannot be followed: {failure}"
        text += "; it computes the names of what it imports" if opcodes.computed else ""
        yield Finding("pickle-damaged", "error" if hidden else "warning", where, text)
    yield from _imports(stream, imports)
    for level, text in odd:
        yield Finding("pickle-odd", level, where, f"pickle {where!r}: {text}")


def _imports(stream: Stream, imports: set[str]) -> Iterator[Finding]:
    known = {name for name in imports if TOLERATED.fullmatch(name)}
    if stream.script:
        classes = {name for name in imports if name.startswith(SCRIPT_CLASS)}
        known |= classes | {name for name in imports if SCRIPT.fullmatch(name)}
        if classes:
            text = f"pickle {stream.where!r} names {len(classes)} classes of the file's own code"
            yield Finding("script-classes", "note", stream.where, text)
    for name in sorted(imports - known):
        text = f"loading {stream.where!r} imports {name}, which no tensor needs"
        yield Finding("pickle-import", "error", stream.where, text)
