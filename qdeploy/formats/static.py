"""A model file, of whatever format, looked at without running, unpickling or importing anything."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from qdeploy.errors import InputError
from qdeploy.formats import archives, pickles
from qdeploy.formats.known import ROWS, format_of
from qdeploy.values import Finding

RULES = {
    rule: text
    for texts in (archives.RULES, *(r.texts for r in ROWS))
    for rule, text in texts.items()
}
CODE_RULES = frozenset({*pickles.RULES, "file-operation", "damaged-code", "unexpected-member"})
Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
MOST_PER_RULE = 20  # a hostile file can be wrong in a million places


def findings_in(path: Path) -> tuple[Finding, ...]:
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
    for finding in findings_in(path):
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
    """An archive that claims to inflate beyond reason is not unpacked to see what it holds."""
    with path.open("rb") as file:
        if file.read(4) == archives.SIGNATURE:
            bomb = False
            for finding in _of_archive(file):
                bomb |= finding.rule == "inflation"
                yield finding
            if bomb:
                return
        elif _ends_as_archive(path):
            text = "the file is an archive too, to whoever reads it from its end"
            yield Finding("hidden-bytes", "error", "", text)
        row = format_of(file, path)
    yield from row.rules(path)


def _of_archive(file: archives.File) -> Iterator[Finding]:
    """What is odd about an archive, and about those in it."""
    for where, part in archives.archives(file):
        if part is None:
            text = f"archives in archives: {where!r} is not looked at"
            yield Finding("deep-archive", "error", where, text)
        else:
            yield from archives.findings_in_archive(part, where)


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
