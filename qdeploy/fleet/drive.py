"""A fleet from its cells to their records, on any executor: none is done twice, none is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

from qdeploy.fleet.cells import Cell
from qdeploy.fleet.document import Record
from qdeploy.fleet.executors import Executor
from qdeploy.fleet.process import Limits
from qdeploy.fleet.seen import CellOutcome, Seen
from qdeploy.fleet.work import Ended, Task, pause_before, record_of

WAIT_SECONDS, ELSEWHERE_SECONDS = 1.0, 5.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How cells are run."""

    limits: Limits
    retries: int
    store: str
    key: Path | None
    work: Path


@dataclass(slots=True)
class State:
    """Where a fleet stands."""

    total: int
    records: dict[str, Record] = field(default_factory=dict)  # by cell
    outcomes: Counter[CellOutcome] = field(default_factory=Counter)
    kept: int = 0  # of them, those that were done before
    under_way: dict[str, str] = field(default_factory=dict)  # titles by cell
    began: float = field(default_factory=time.monotonic)

    def add(self, record: Record, *, kept: bool = False) -> None:
        """A cell that came to its end."""
        self.records[record.id] = record
        self.outcomes[record.outcome] += 1
        self.kept += kept

    @property
    def computed(self) -> int:
        return len(self.records) - self.kept

    @property
    def left(self) -> int:
        return self.total - len(self.records)

    @property
    def per_minute(self) -> float:
        """Cells that this run has computed."""
        return 60 * self.computed / max(time.monotonic() - self.began, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None while nobody can know."""
        return 60 * self.left / self.per_minute if self.computed else None


@dataclass(order=True, slots=True)
class _Waiting:
    """A cell that has not begun; the earliest first, in the order of the manifest."""

    not_before: float
    place: int
    attempt: int
    cell: Cell = field(compare=False)


def drive(
    cells: Sequence[Cell],
    known: Callable[[Cell], Record | None],
    executor: Executor,
    terms: Terms,
    told: Callable[[State], None],
) -> State:
    """Run every cell that is not done.

    Args:
        known: The record of a cell that is.
        told: Is told where it stands whenever that has changed.
    """
    state = State(len(cells))
    waiting: list[_Waiting] = []
    for place, cell in enumerate(cells):
        record = refused(cell) or known(cell)
        if record is None:
            heappush(waiting, _Waiting(0.0, place, 1, cell))
        else:
            state.add(record, kept=True)
    under_way: dict[str, _Waiting] = {}
    told(state)
    while waiting or under_way:
        for one in _due(waiting, executor.slots - len(under_way)):
            under_way[one.cell.id] = one
            state.under_way[one.cell.id] = one.cell.title
            executor.start(
                Task(one.cell, one.attempt, terms.limits, terms.store, terms.key, terms.work)
            )
        for ended in executor.ended(_patience(waiting, under_way)):
            one = under_way.pop(ended.id)
            del state.under_way[ended.id]
            _settle(ended, one, terms.retries, waiting, state)
        told(state)
    return state


def refused(cell: Cell) -> Record | None:
    """The record of a cell that cannot even begin."""
    if cell.refused is None:
        return None
    return record_of(cell, Seen(CellOutcome.BAD_INPUT, cell.refused), 0)


def _due(waiting: list[_Waiting], slots: int) -> Iterator[_Waiting]:
    """Those that may begin, as many as there are slots for."""
    for _ in range(slots):
        if not waiting or waiting[0].not_before > time.monotonic():
            return
        yield heappop(waiting)


def _patience(waiting: list[_Waiting], under_way: Mapping[str, _Waiting]) -> float:
    """Seconds until something can be begun, if nothing ends before."""
    if under_way or not waiting:
        return WAIT_SECONDS
    until = min(WAIT_SECONDS, max(0.0, waiting[0].not_before - time.monotonic()))
    time.sleep(until)
    return 0.0


def _settle(
    ended: Ended, one: _Waiting, retries: int, waiting: list[_Waiting], state: State
) -> None:
    """The record of a cell, or another attempt at it."""
    now = time.monotonic()
    if ended.record is None:
        one.not_before = now + ELSEWHERE_SECONDS
        heappush(waiting, one)
    elif ended.again and one.attempt <= retries:
        one.not_before, one.attempt = now + pause_before(one.attempt), one.attempt + 1
        heappush(waiting, one)
    else:
        state.add(ended.record, kept=ended.elsewhere)
