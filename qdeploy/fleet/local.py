"""Cells in processes on this machine, each on cores of its own, forked off one that is ready."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from queue import SimpleQueue
from threading import Event

from qdeploy.errors import UsageError
from qdeploy.fleet.forks import Forks
from qdeploy.fleet.manifest import LimitsSpec, LocalSpec
from qdeploy.fleet.work import Ended, Task, work
from qdeploy.machine import cores


class Local:
    """A thread waits for each process."""

    def __init__(self, slots: int, cores_each: int) -> None:
        self.slots = slots
        self._stop, self._forks = Event(), Forks(cores_each)
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="cell")
        self._under_way: set[Future[Ended]] = set()
        self._free: SimpleQueue[frozenset[int]] = SimpleQueue()
        for own in _shares(slots, cores_each):
            self._free.put(own)

    def start(self, task: Task) -> None:
        self._under_way.add(self._threads.submit(self._work, task))

    def ended(self, seconds: float) -> list[Ended]:
        done, self._under_way = wait(self._under_way, seconds, FIRST_COMPLETED)
        return [future.result() for future in done]

    def close(self) -> None:
        self._stop.set()
        self._threads.shutdown()
        self._forks.close()

    def _work(self, task: Task) -> Ended:
        own = self._free.get()
        try:
            return work(
                replace(task, limits=replace(task.limits, pinned=own)), self._forks, self._stop
            )
        finally:
            self._free.put(own)


def _shares(slots: int, cores_each: int) -> Iterator[frozenset[int]]:
    """Cores for each slot; none are named where they are too few, or the system has no names."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for slot in range(slots):
        own = known[slot * cores_each : (slot + 1) * cores_each]
        yield frozenset(own if len(own) == cores_each else ())


def open_local(spec: LocalSpec, limits: LimitsSpec) -> Local:
    """As many cells at once as there are cores for.

    Raises:
        UsageError: there are too few for one.
    """
    if limits.cores > cores():
        raise UsageError(f"a cell takes {limits.cores} cores, and there are {cores()}")
    return Local(spec.workers or cores() // limits.cores, limits.cores)
