"""A cell from its command to its record: what every worker does, on whatever machine."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import join
from signal import Signals
from threading import Event

from qdeploy.disk.files import file_sha256, make_folder, remove, write_atomically
from qdeploy.disk.state import KEY_VARIABLE, opened, sealed
from qdeploy.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_NO_VERDICT,
    OutputError,
    QdeployError,
    first_line,
)
from qdeploy.fleet.cells import Cell
from qdeploy.fleet.document import Record, WrittenFile
from qdeploy.fleet.process import End, Limits, Starter, watch
from qdeploy.fleet.seen import VERDICTS, CellOutcome, Seen
from qdeploy.fleet.store import Folder, Store, open_store
from qdeploy.fleet.verbs import verb_of
from qdeploy.runs.rundir import UNDER_WAY

LOG, LEFT, KEPT = "log.txt", "left", "kept"
KEPT_OUTCOMES = frozenset(VERDICTS.values()) | {CellOutcome.DONE, CellOutcome.DUD}
SEAL = ".sealed"
# as our own errors begin: names of strangers stand further on in a line
BUSY = re.compile(rf"^error: run \S+ {UNDER_WAY} \(", re.MULTILINE)
FULL = re.compile(
    rf"^error: cannot write .*({os.strerror(errno.ENOSPC)}|{os.strerror(errno.EDQUOT)})$",
    re.MULTILINE,
)
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
    elsewhere: bool = False  # it is another's doing


def work(task: Task, starter: Starter, stop: Event) -> Ended:
    """Run a cell, unless it is done or somebody else is at it, and keep what it leaves.

    Whatever goes wrong is a record: nothing is raised.
    """
    try:
        store = open_store(task.store, task.key)
        here = Folder(task.work)  # a store at a URL keeps nobody out of this folder
        with store.blobs.claim(task.cell.id) as mine, here.claim(task.cell.id) as alone:
            if not (mine and alone):
                return Ended(task.cell.id, None, again=True, elsewhere=True)
            record = store.record(task.cell.id)
            if record is not None and store.whole(record):
                return Ended(task.cell.id, record, again=False, elsewhere=True)
            return _run(task, store, starter, stop)
    except QdeployError as error:  # the store, or the disk
        said, again = str(error), True
    except Exception as error:  # noqa: BLE001 - a bug in one cell does not end the others
        said, again = f"bug: {type(error).__name__}: {first_line(error)}", False
    failed = Seen(CellOutcome.FAILED, said)
    return Ended(task.cell.id, record_of(task.cell, failed, task.attempt), again=again)


def labelled(cell: Cell, record: Record) -> Record:
    """A record as this fleet calls its cell: whoever made it may have called it otherwise."""
    asked = cell.asked
    labels = {"title": cell.title, "model": asked.label, "recipe": asked.recipe}
    labels |= {"policy": asked.policy, "device": asked.device}
    return record.model_copy(update=labels)


def record_of(cell: Cell, seen: Seen, attempts: int) -> Record:
    """What is said of a cell that has left nothing."""
    asked = cell.asked
    return Record(
        id=cell.id, title=cell.title, model=asked.label, verb=asked.verb, recipe=asked.recipe,
        policy=asked.policy, device=asked.device, attempts=attempts,
        **{key: value for key, value in asdict(seen).items() if key != "read"},
    )  # fmt: skip


def _run(task: Task, store: Store, starter: Starter, stop: Event) -> Ended:
    cell, folder = task.cell, _own_folder(task, store.key)
    left, kept, log = folder / LEFT, folder / KEPT, folder / LEFT / LOG
    row = verb_of(cell.asked.verb)
    if not row.goes_on:
        remove(left)
    make_folder(left)
    make_folder(kept)
    remove(left / row.left)  # of an attempt that was killed after it
    command = [*row.command(cell.asked, left, kept), "--quiet"]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    said_before = log.stat().st_size if log.exists() else 0
    shared = {KEY_VARIABLE: str(task.key)} if task.key is not None else {}
    end = watch(starter.start(command, task.limits, log, shared), task.limits, stop)
    if end.stopped:
        return Ended(cell.id, None, again=True)
    said = _tail(log, said_before)
    if BUSY.search(said) and end.result.code == EXIT_BAD_INPUT:
        return Ended(cell.id, None, again=True, elsewhere=True)
    seen = _seen(task, end) or _unfinished(end, said)
    if seen.outcome in KEPT_OUTCOMES and (changed := _changed(cell)) is not None:
        seen = Seen(CellOutcome.FAILED, f"{changed} was written to while the fleet ran")
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
        return Seen(
            CellOutcome.FAILED, f"{task.cell.asked.model} was written to while the fleet ran"
        )
    return seen


def _changed(cell: Cell) -> Path | None:
    """A file that is not any more what the cell was called by."""
    return next((one.path for one in cell.inputs if one.changed), None)


def _own_folder(task: Task, key: bytes) -> Path:
    """What is under way of a cell; what lies there and is not sealed with the key is taken away.

    Raises:
        OutputError: it cannot be written.
    """
    folder = task.work / task.cell.id
    if task.work.is_symlink():
        raise OutputError(f"cannot write {task.work}: is a link", hint="remove it")
    seal = folder / SEAL
    held = seal.is_file() and not seal.is_symlink() and not folder.is_symlink()
    if not held or opened(seal.read_bytes(), "cell folder", task.cell.id, key=key) is None:
        remove(folder)
        make_folder(folder)
        write_atomically(seal, sealed(b"", "cell folder", task.cell.id, key=key))
    return folder


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
    return FULL.search(said) is not None


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
        if (
            path.is_file()
            and not path.is_symlink()
            and not any(part.startswith(".") for part in Path(name).parts)
        ):
            yield WrittenFile(
                name=name, sha256=file_sha256(path, what="result"), size_bytes=path.stat().st_size
            )


def pause_before(attempt: int) -> float:
    """Seconds before another attempt: a full disk or a lost machine does not mend at once."""
    return min(60.0, 2.0 ** (attempt - 1))
