"""An end to runs of onnxruntime that take too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOKS_EVERY_SECONDS = 0.5


class Watchdog:
    """One thread that ends whatever is overdue; it sleeps while nothing is watched."""

    def __init__(self) -> None:
        self._due: dict[int, tuple[float, Callable[[], object]]] = {}
        self._watched = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._next = 0

    @contextmanager
    def watching(self, seconds: float, end: Callable[[], object]) -> Iterator[None]:
        """Call `end` once, in another thread, if what is inside is not done after `seconds`."""
        with self._lock:
            self._start()
            self._next += 1
            ticket = self._next
            self._due[ticket] = time.monotonic() + seconds, end
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
                overdue = [ticket for ticket, (due, _) in self._due.items() if due <= now]
                ends = [self._due.pop(ticket)[1] for ticket in overdue]
                if not self._due:
                    self._watched.clear()
            for end in ends:
                end()


WATCHDOG = Watchdog()
