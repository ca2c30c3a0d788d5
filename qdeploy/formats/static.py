"""A model file, of whatever format, looked at without running, unpickling or importing anything."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats import archives, pickles, safetensors_header
from qdeploy.formats.onnx import rules as onnx_rules
from qdeploy.formats.onnx.external import external_data, load_external
from qdeploy.formats.onnx.reading import LARGEST_MODEL_BYTES, parse_proto
from qdeploy.formats.opening import PROGRAMS, sniff
from qdeploy.formats.script_code import file_operations
from qdeploy.values import Finding, Format

RULES = {
    **onnx_rules.RULES,
    **archives.RULES,
    **pickles.RULES,
    **safetensors_header.RULES,
    "holds-code": "The file is a program: loading it runs code from it.",
    "damaged-code": "TorchScript code cannot be read.",
    "file-operation": "TorchScript code reads or writes files, or calls foreign operators.",
}
CODE_RULES = frozenset({*pickles.RULES, "file-operation", "damaged-code", "unexpected-member"})
Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
MOST_PER_RULE = 20  # a hostile file can be wrong in a million places


def look(path: Path) -> tuple[Finding, ...]:
    """What stands against the file: errors first, then warnings, then notes.

    Of each rule the first places are named and the others counted.

    Raises:
        InputError: there is no file, or it is empty, truncated or no model.
    """
    if not path.is_file():
        raise InputError(f"model {path}: no such file")
    found = list(_shortened(_findings(path)))
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def refuse_hostile(path: Path, *, run_code_from_model: bool = False) -> None:
    """Refuse to open a file that the scan finds an error in.

    Args:
        run_code_from_model: Its code was asked for, so that pickled code is no reason.

    Raises:
        InputError: the first error, with the rule that is broken.
    """
    asked_for = CODE_RULES if run_code_from_model else frozenset()
    for finding in look(path):
        if finding.level == "error" and finding.rule not in asked_for:
            raise InputError(
                f"model {path}: {finding.message} ({finding.rule})",
                hint="qdeploy scan shows all that stands against the file",
            )


def _ends_as_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one that spans several disks
        return True


def _findings(path: Path) -> Iterator[Finding]:
    with path.open("rb") as file:
        zipped = file.read(4) == archives.SIGNATURE
    if zipped:
        yield from _torch_file(path)
        return
    if _ends_as_archive(path):
        text = "the file is an archive too, to whoever reads it from its end"
        yield Finding("hidden-bytes", "error", "", text)
    kind = sniff(path)
    if kind is Format.SAFETENSORS:
        yield from safetensors_header.look_at_header(path)
    elif kind is Format.STATE_DICT:
        with path.open("rb") as file:
            data = file.read(pickles.LARGEST_PICKLE_BYTES)
        yield from pickles.examine([pickles.Stream(path.name, data)])
    else:
        yield from _onnx_file(path)


def _torch_file(path: Path) -> Iterator[Finding]:
    """An archive that claims to inflate beyond reason is not unpacked to see what it holds."""
    with path.open("rb") as file:
        bomb = False
        for where, part in archives.archives(file):
            if part is None:
                text = f"archives in archives: {where!r} is not looked at"
                yield Finding("deep-archive", "error", where, text)
                continue
            for finding in archives.look_into(part, where):
                bomb |= finding.rule == "inflation"
                yield finding
        if bomb:
            return
        kind = sniff(path)
        if kind in PROGRAMS:
            text = f"{PROGRAMS[kind]} is a program, not tensors alone: to load it is to run it"
            yield Finding("holds-code", "warning", "", text)
        if kind is Format.TORCHSCRIPT:
            yield from _code(file)
        yield from pickles.examine(pickles.in_archive(file))


def _code(file: archives.File) -> Iterator[Finding]:
    try:
        with foreign_reader("TorchScript code"), archives.opened(file) as archive:
            found = list(file_operations(archive))
    except InputError as error:
        yield Finding("damaged-code", "error", "", str(error))
        return
    for member, call in found:
        text = f"the TorchScript in {member!r} calls {call}, which no classifier needs"
        yield Finding("file-operation", "error", member, text)


def _onnx_file(path: Path) -> Iterator[Finding]:
    size = path.stat().st_size
    if size > LARGEST_MODEL_BYTES:
        raise InputError(f"model {path}: larger than {LARGEST_MODEL_BYTES} bytes")
    proto = parse_proto(path.read_bytes(), str(path))
    outside = list(external_data(proto, path))
    yield from outside
    if not any(finding.level == "error" for finding in outside):
        load_external(proto, path)
    yield from onnx_rules.inspect(proto)


def _shortened(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The first findings of each rule, and one that counts the rest."""
    seen: Counter[tuple[str, Level]] = Counter()
    for finding in findings:
        seen[finding.rule, finding.level] += 1
        if seen[finding.rule, finding.level] <= MOST_PER_RULE:
            yield finding
    for (rule, level), count in seen.items():
        if count > MOST_PER_RULE:
            yield Finding(rule, level, "", f"and {count - MOST_PER_RULE} more like these")
