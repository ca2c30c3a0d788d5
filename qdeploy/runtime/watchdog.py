"""An end to runs of onnxruntime that take too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LOOKS_EVERY_SECONDS = 0.5
WALL_FACTOR = 10  # a busy machine gives a process little of its time, a suspended one nothing


@dataclass(frozen=True, slots=True)
class _Watched:
    """What must be done in some seconds; where it computes here, in as many of this process."""

    seconds: float
    end: Callable[[], object]
    computes: bool
    began: float
    worked: float  # seconds of the processor, before it began

    def overdue(self, now: float) -> bool:
        passed = now - self.began
        if passed < self.seconds or not self.computes:
            return passed >= self.seconds
        worked = time.process_time() - self.worked
        return worked >= self.seconds or passed >= WALL_FACTOR * self.seconds


class Watchdog:
    """One thread that ends whatever is overdue; it sleeps while nothing is watched."""

    def __init__(self) -> None:
        self._due: dict[int, _Watched] = {}
        self._watched = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._next = 0

    @contextmanager
    def watching(
        self, seconds: float, end: Callable[[], object], *, computes: bool = False
    ) -> Iterator[None]:
        """Call `end` once, in another thread, if what is inside is not done after `seconds`.

        Args:
            computes: In this process, which may wait for a processor: it has to take as long there.
        """
        with self._lock:
            self._start()
            self._next += 1
            ticket = self._next
            self._due[ticket] = _Watched(
                seconds, end, computes, time.monotonic(), time.process_time()
            )
            self._watched.set()
        try:
            yield
        finally:
            with self._lock:
                self._due.pop(ticket, None)

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():  # a forked process has no threads
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()

    def _watch(self) -> None:
        while True:
            self._watched.wait()
            time.sleep(LOOKS_EVERY_SECONDS)
            now = time.monotonic()
            with self._lock:
                overdue = [ticket for ticket, one in self._due.items() if one.overdue(now)]
                ends = [self._due.pop(ticket).end for ticket in overdue]
                if not self._due:
                    self._watched.clear()
            for end in ends:
                end()


WATCHDOG = Watchdog()
