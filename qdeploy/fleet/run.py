"""A fleet from its manifest to one report over all."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from qdeploy import __version__
from qdeploy.disk.files import make_folder, read_bounded, require_writable, write_atomically
from qdeploy.errors import OutputError, UsageError
from qdeploy.fleet.cells import Cell, cells_of
from qdeploy.fleet.document import SCHEMA_VERSION, FleetDocument, Record, Status
from qdeploy.fleet.drive import State, Terms, drive
from qdeploy.fleet.executors import open_executor
from qdeploy.fleet.forms import form_of, place_of, render
from qdeploy.fleet.manifest import FleetSpec, load_manifest
from qdeploy.fleet.models import Fetched, list_models
from qdeploy.fleet.process import Limits
from qdeploy.fleet.seen import CellOutcome, Seen
from qdeploy.fleet.store import Store, is_url, open_store
from qdeploy.fleet.whole import changes, read_fleet, whole
from qdeploy.fleet.work import labelled, record_of
from qdeploy.progress import Progress
from qdeploy.report.kept import parse_object
from qdeploy.settings.schema import validate

LARGEST_STATUS_BYTES = 16 << 20
JSON, PAGE, STATUS, WORK, FETCHED = "fleet.json", "fleet.html", "status.json", "work", "models"


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """What is asked of a fleet."""

    manifest: Path
    out: Path  # folder of the report, and of what is under way
    reports: tuple[Path, ...] = ()
    since: Path | None = None  # fleet.json of an earlier run
    share: tuple[int, int] | None = None  # which of how many shares of the cells; None: all
    executor: Literal["local", "ray"] | None = None  # in place of the manifest's
    workers: int | None = None  # the same


@dataclass(frozen=True, slots=True)
class Planned:
    """What a manifest comes to."""

    spec: FleetSpec
    store: Store
    terms: Terms
    cells: tuple[Cell, ...]
    out: Path

    @property
    def distinct(self) -> tuple[Cell, ...]:
        """Each command once: models may be the same under two names."""
        return tuple({cell.id: cell for cell in reversed(self.cells)}.values())[::-1]

    def known(self, cell: Cell) -> Record | None:
        """The record of a cell whose files are all here now; None if it is still to be done."""
        record = self.store.record(cell.id)
        if record is None:
            return None
        place = self.out / place_of(labelled(cell, record))
        return record if self.store.fetch(record, place) else None


def plan_fleet(request: FleetRequest, progress: Progress) -> Planned:
    """The cells of a manifest, each checked as its command would.

    Raises:
        UsageError, InputError: the manifest, or a file that it names, is not valid.
        OutputError: the report has no place to go.
    """
    for report in request.reports:
        form_of(report)
        require_writable(report)
    spec = _with_executor(load_manifest(request.manifest), request)
    folder = request.manifest.absolute().parent
    make_folder(request.out)
    out = request.out.absolute()
    key = folder / spec.key if spec.key is not None else None
    place = spec.store if is_url(spec.store) else str(folder / spec.store)
    store = open_store(place, key)
    models = list_models(spec.models, folder, Fetched(out / FETCHED, store.key), progress)
    cells = cells_of(spec, folder, models, progress)
    return Planned(spec, store, _terms(spec, place, key, out), _shared(cells, request.share), out)


def _with_executor(spec: FleetSpec, request: FleetRequest) -> FleetSpec:
    said: dict[str, Any] = {"kind": request.executor or spec.executor.kind}
    if said["kind"] == spec.executor.kind:
        said = spec.executor.model_dump()
    if request.workers is not None:
        said["workers"] = request.workers
    return validate({**spec.model_dump(), "executor": said}, FleetSpec, where="options")


def _terms(spec: FleetSpec, store: str, key: Path | None, out: Path) -> Terms:
    limits = spec.limits
    memory = None if limits.memory_gb is None else int(limits.memory_gb * 1e9)
    return Terms(
        limits=Limits(limits.minutes * 60, memory, limits.cores),
        retries=limits.retries,
        store=store,
        key=key,
        work=out / WORK,
    )


def _shared(cells: Sequence[Cell], share: tuple[int, int] | None) -> tuple[Cell, ...]:
    """One share: every n-th of the cells by their ids, which no order of a manifest changes.

    Raises:
        UsageError: there is no such share.
    """
    if share is None:
        return tuple(cells)
    number, count = share
    if not 0 <= number < count:
        raise UsageError(f"--share {number}/{count}: shares are 0/{count} to {count - 1}/{count}")
    return tuple(sorted(cells, key=lambda cell: cell.id)[number::count])


def run_fleet(
    request: FleetRequest, progress: Progress, told: Callable[[State], None]
) -> FleetDocument:
    """Run what is not done yet, and write the report over all.

    Raises:
        QdeployError: the manifest or the executor is not usable, or the report cannot be written;
            what is done is kept.
    """
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    planned = plan_fleet(request, progress)
    before = read_fleet(request.since) if request.since is not None else None
    board = Board(planned, request, told)
    executor = open_executor(planned.spec.executor, planned.spec.limits)
    try:
        state = drive(planned.distinct, planned.known, executor, planned.terms, board.tell)
    finally:
        executor.close()
    records = _collected(planned, state, request)
    document = FleetDocument(
        schema_version=SCHEMA_VERSION,
        name=planned.spec.name,
        outcome=whole(records).value,
        version=__version__,
        started=started,
        seconds=time.monotonic() - began,
        computed=state.computed,
        cells=records,
        changes=None if before is None else tuple(changes(before.cells, records)),
    )
    _deliver(document, planned, request)
    board.end(state)
    return document


def _collected(planned: Planned, state: State, request: FleetRequest) -> tuple[Record, ...]:
    """A record of every cell, and its files; those of one share stay in the store."""
    records = []
    for cell in planned.cells:
        record = labelled(cell, state.records[cell.id])
        place = planned.out / place_of(record)
        if request.share is None and not planned.store.fetch(record, place):
            lost = Seen(CellOutcome.FAILED, "what it has left is not in the store any more")
            record = record_of(cell, lost, record.attempts)
        records.append(record)
    return tuple(records)


def _deliver(document: FleetDocument, planned: Planned, request: FleetRequest) -> None:
    """The reports; of one share there are none."""
    if request.share is not None:
        return
    for place in (planned.out / JSON, planned.out / PAGE, *request.reports):
        write_atomically(place, render(document, place))


def status_place(out: Path, share: tuple[int, int] | None) -> Path:
    """Where it is said how far a fleet is, or one share of its cells."""
    return out / (STATUS if share is None else f"status-{share[0]}-of-{share[1]}.json")


def read_status(place: Path) -> Status:
    """How far a fleet is.

    Raises:
        UsageError: none has begun there.
        InputError: the file is damaged.
    """
    if not place.exists():
        raise UsageError(f"{place}: no run of this fleet has begun", hint="or give its --out")
    table = parse_object(read_bounded(place, LARGEST_STATUS_BYTES, what="status"), what=f"{place}")
    return validate(table, Status, where=f"status {place}")


class Board:
    """What others see of a fleet under way: status.json, written whenever something has ended."""

    def __init__(
        self, planned: Planned, request: FleetRequest, told: Callable[[State], None]
    ) -> None:
        self._place = status_place(planned.out, request.share)
        self._name, self._told = planned.spec.name, told
        self._last: tuple[int, frozenset[str]] | None = None

    def tell(self, state: State) -> None:
        now = len(state.records), frozenset(state.under_way)
        if now == self._last:
            return
        self._last = now
        self._write(state, finished=False)
        self._told(state)

    def end(self, state: State) -> None:
        self._write(state, finished=True)

    def _write(self, state: State, *, finished: bool) -> None:
        left = state.seconds_left
        status = Status(
            name=self._name,
            host=platform.node(),
            process=os.getpid(),
            finished=finished,
            cells=state.total,
            done=len(state.records),
            kept=state.kept,
            outcomes={outcome.value: count for outcome, count in state.outcomes.items()},
            under_way=tuple(sorted(state.under_way.values())),
            per_minute=round(state.per_minute, 2),
            seconds_left=None if left is None else round(left),
        )
        with suppress(OutputError):  # nobody's result depends on it
            write_atomically(self._place, status.model_dump_json(indent=1).encode())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is to be expected of a fleet."""

    cells: int
    refused: int
    done: int
    seconds: float | None  # of one worker; None: no cell of such a command has been done yet


def estimate(planned: Planned) -> Estimate:
    """From the seconds that cells of the same command took, where some are done."""
    known = {cell.id: planned.store.record(cell.id) for cell in planned.cells}
    took: dict[str, list[float]] = {}
    for record in filter(None, known.values()):
        took.setdefault(record.verb, []).append(record.seconds)
    todo = [c for c in planned.cells if known[c.id] is None and c.refused is None]
    verbs = Counter(cell.asked.verb for cell in todo)
    seconds = None
    if verbs.keys() <= took.keys():
        seconds = sum(count * median(took[verb]) for verb, count in verbs.items())
    refused = sum(cell.refused is not None for cell in planned.cells)
    return Estimate(len(planned.cells), refused, len(planned.cells) - refused - len(todo), seconds)
