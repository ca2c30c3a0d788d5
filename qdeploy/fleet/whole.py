"""The verdict over a fleet, and what has changed since an earlier one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from qdeploy.disk.files import read_bounded
from qdeploy.fleet.document import Change, FleetDocument, Record
from qdeploy.fleet.seen import CellOutcome
from qdeploy.judging.verdict import Outcome
from qdeploy.report.kept import parse_object
from qdeploy.settings.schema import validate

LARGEST_DOCUMENT_BYTES = 1 << 30
KNOWN = frozenset({CellOutcome.ACCEPT, CellOutcome.DONE})


def whole(records: Iterable[Record]) -> Outcome:
    """REJECT if any cell is rejected; else NO VERDICT if anything is not known of any; else ACCEPT.

    A cell that failed, or whose model could not be read, is one of which nothing is known.
    """
    seen = {record.outcome for record in records}
    if CellOutcome.REJECT in seen:
        return Outcome.REJECT
    return Outcome.ACCEPT if seen <= KNOWN else Outcome.NO_VERDICT


def read_fleet(path: Path) -> FleetDocument:
    """The fleet.json at `path`.

    Raises:
        InputError: it cannot be read, or is none.
    """
    data = read_bounded(path, LARGEST_DOCUMENT_BYTES, what="fleet report")
    table = parse_object(data, what=f"fleet report {path}")
    return validate(table, FleetDocument, where=f"fleet report {path}")


def changes(before: Iterable[Record], now: Iterable[Record]) -> Iterator[Change]:
    """Cells that came, went, got another verdict or another file; told by their titles."""
    old = {record.title: record for record in before}
    new = {record.title: record for record in now}
    for title, record in new.items():
        known = old.get(title)
        if known is None:
            yield Change(title=title, before=None, now=_state(record))
        elif (known.outcome, known.sha256) != (record.outcome, record.sha256):
            yield Change(title=title, before=_state(known), now=_state(record))
    for title in old.keys() - new.keys():
        yield Change(title=title, before=_state(old[title]), now=None)


def _state(record: Record) -> str:
    rates = (("CDA", record.accuracy), ("ASR", record.attack_success))
    shown = [f"{name} {rate:.1f}" for name, rate in rates if rate is not None]
    file = [] if record.sha256 is None else [f"file {record.sha256[:12]}"]
    return ", ".join([record.outcome.value, *shown, *file])
