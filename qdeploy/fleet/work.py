"""A cell from its command to its record: what every worker does, on whatever machine."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import join
from signal import Signals
from threading import Event

from qdeploy.disk.files import file_sha256, make_folder
from qdeploy.disk.state import KEY_VARIABLE
from qdeploy.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_NO_VERDICT,
    QdeployError,
    first_line,
)
from qdeploy.fleet.cells import Cell
from qdeploy.fleet.document import Record, WrittenFile
from qdeploy.fleet.process import End, Limits, Starter, watch
from qdeploy.fleet.seen import VERDICTS, CellOutcome, Seen
from qdeploy.fleet.store import Store, open_store
from qdeploy.fleet.verbs import verb_of
from qdeploy.runs.rundir import UNDER_WAY

LOG, LEFT, KEPT = "log.txt", "left", "kept"
KEPT_OUTCOMES = frozenset(VERDICTS.values()) | {CellOutcome.DONE, CellOutcome.DUD}
TAIL_BYTES, LONGEST_REASON = 4096, 300


@dataclass(frozen=True, slots=True)
class Task:
    """All that a worker needs to know of a cell."""

    cell: Cell
    attempt: int  # from 1
    limits: Limits
    store: str
    key: Path | None
    work: Path  # folder for what is under way


@dataclass(frozen=True, slots=True)
class Ended:
    """How one attempt at a cell ended."""

    id: str
    record: Record | None  # None: somebody else is at it, or it was stopped
    again: bool  # another attempt may end otherwise
    elsewhere: bool = False


def work(task: Task, starter: Starter, stop: Event) -> Ended:
    """Run a cell, unless it is done or somebody else is at it, and keep what it leaves.

    Whatever goes wrong is a record: nothing is raised.
    """
    try:
        store = open_store(task.store, task.key)
        with store.blobs.claim(task.cell.id) as mine:
            if not mine:
                return Ended(task.cell.id, None, again=True, elsewhere=True)
            record = store.record(task.cell.id)
            return (
                Ended(task.cell.id, record, again=False)
                if record
                else _run(task, store, starter, stop)
            )
    except QdeployError as error:  # the store, or the disk
        said = str(error)
    except Exception as error:  # noqa: BLE001 - a bug in one cell does not end the others
        said = f"bug: {type(error).__name__}: {first_line(error)}"
    failed = Seen(CellOutcome.FAILED, said)
    return Ended(task.cell.id, record_of(task.cell, failed, task.attempt), again=True)


def record_of(cell: Cell, seen: Seen, attempts: int) -> Record:
    """What is said of a cell that has left nothing."""
    asked = cell.asked
    return Record(
        id=cell.id, title=asked.title, model=asked.label, verb=asked.verb, recipe=asked.recipe,
        policy=asked.policy, device=asked.device, attempts=attempts,
        **{key: value for key, value in asdict(seen).items() if key != "read"},
    )  # fmt: skip


def _run(task: Task, store: Store, starter: Starter, stop: Event) -> Ended:
    cell, folder = task.cell, task.work / task.cell.id
    left, kept, log = folder / LEFT, folder / KEPT, folder / LEFT / LOG
    row = verb_of(cell.asked.verb)
    make_folder(left)
    make_folder(kept)
    (left / row.left).unlink(missing_ok=True)  # of an attempt that was killed after it
    command = [*row.command(cell.asked, left, kept), "--quiet"]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    said_before = log.stat().st_size if log.exists() else 0
    shared = {KEY_VARIABLE: str(task.key)} if task.key is not None else {}
    end = watch(starter.start(command, task.limits, log, shared), task.limits, stop)
    if end.stopped:
        return Ended(cell.id, None, again=True)
    said = _tail(log, said_before)
    if UNDER_WAY in said and end.result.code == EXIT_BAD_INPUT:
        return Ended(cell.id, None, again=True, elsewhere=True)
    seen = _seen(task, end) or _unfinished(end, said)
    complete = seen.outcome in KEPT_OUTCOMES and (left / row.left).exists()
    record = record_of(cell, seen, task.attempt).model_copy(
        update={
            "seconds": end.seconds,
            "cpu_seconds": end.result.cpu_seconds,
            "peak_bytes": end.result.peak_bytes,
            "where": f"{platform.node()}, {platform.machine()}",
            "started": started,
            "command": join(["qdeploy", *command]),
        }
    )
    if complete:
        record = record.model_copy(update={"files": tuple(_files(left))})
        store.keep(record, left)
        shutil.rmtree(folder, ignore_errors=True)
    return Ended(cell.id, record, again=not complete and _may_differ(end, said))


def _seen(task: Task, end: End) -> Seen | None:
    """What the command has left; None if it did not come to its end."""
    row, left = verb_of(task.cell.asked.verb), task.work / task.cell.id / LEFT
    if end.result.code < 0 or end.exceeded is not None or not (left / row.left).exists():
        return None
    try:
        seen = row.seen(end.result.code, left)
    except QdeployError as error:
        return Seen(CellOutcome.FAILED, str(error))
    if seen.read is not None and seen.read not in task.cell.digests:
        return Seen(CellOutcome.FAILED, "the model was written to while the fleet ran")
    return seen


def _unfinished(end: End, said: str) -> Seen:
    """Why a command has left nothing to read."""
    if end.exceeded is not None:
        return Seen(CellOutcome.FAILED, end.exceeded)
    if end.result.code < 0:
        return Seen(CellOutcome.FAILED, f"killed by {Signals(-end.result.code).name}")
    if end.result.code == EXIT_NO_VERDICT:
        return Seen(CellOutcome.NO_VERDICT, _last_line(said))
    if end.result.code == EXIT_BAD_INPUT and not _disk_full(said):
        return Seen(CellOutcome.BAD_INPUT, _last_line(said))
    return Seen(CellOutcome.FAILED, f"exit code {end.result.code}: {_last_line(said)}")


def _may_differ(end: End, said: str) -> bool:
    """Whether the same command may end otherwise: it was killed, or the disk was full."""
    killed = end.result.code < 0 or end.result.code == EXIT_INTERRUPTED
    return end.exceeded is None and (killed or _disk_full(said))


def _disk_full(said: str) -> bool:
    return any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT))


def _last_line(said: str) -> str:
    """The error, if the command has told one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["said nothing"])[-1][:LONGEST_REASON]


def _tail(log: Path, before: int) -> str:
    """The end of what the last attempt said."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(before, size - TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def _files(folder: Path) -> Iterator[WrittenFile]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            yield WrittenFile(
                name=name, sha256=file_sha256(path, what="result"), size_bytes=path.stat().st_size
            )


def pause_before(attempt: int) -> float:
    """Seconds before another attempt: a full disk or a lost machine does not mend at once."""
    return min(60.0, 2.0 ** (attempt - 1))
