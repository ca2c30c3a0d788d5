"""One command in a process of its own, which ends when it takes too much, or when its maker does.

Every cell reads a stranger's files, so that none shares a process with another: what crashes, hangs
or eats memory is one cell, and nothing that a file does to its process outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from resource import struct_rusage
from threading import Event
from typing import Protocol

POLL_SECONDS, WEIGH_SECONDS, LEAVE_SECONDS = 0.05, 1.0, 10.0
PROGRAM = ("-m", "qdeploy")
# Before the command: end with the thread that waits for it, and keep to the cores that it is given.
LAUNCHER = (
    "import ctypes, os, signal, sys;"
    "getattr(ctypes.CDLL(None), 'prctl', int)(1, signal.SIGKILL);"  # PR_SET_PDEATHSIG, on Linux
    "os.getppid() == int(sys.argv[1]) or os._exit(1);"
    "cores = [int(core) for core in sys.argv[2].split(',') if core];"
    "cores and os.sched_setaffinity(0, cores);"
    "os.execv(sys.argv[3], sys.argv[3:])"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may take."""

    seconds: float
    memory_bytes: int | None
    cores: int
    pinned: frozenset[int] = field(default_factory=frozenset)  # to these; empty: to none


@dataclass(frozen=True, slots=True)
class Result:
    """How a process ended."""

    code: int  # negative: the signal
    cpu_seconds: float
    peak_bytes: int  # of its largest process


@dataclass(frozen=True, slots=True)
class End:
    """How a command ended."""

    result: Result
    seconds: float
    exceeded: str | None = None  # the limit it was ended for
    stopped: bool = False  # somebody else wanted it to end


class Started(Protocol):
    """A process that leads a session of its own."""

    pid: int

    def poll(self) -> Result | None:
        """How it ended; None while it runs."""
        ...


class Starter(Protocol):
    """Makes processes that run `qdeploy`, and that do not outlive their maker."""

    def start(
        self, words: Sequence[str], limits: Limits, log: Path, shared: Mapping[str, str]
    ) -> Started:
        """Run the command of `words`; what it says is added to `log`.

        Args:
            shared: Variables of its environment.
        """
        ...


class Spawned:
    """A fresh interpreter for each command.

    Args:
        program: What Python is to run with its words.
    """

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self._program = tuple(program)

    def start(
        self, words: Sequence[str], limits: Limits, log: Path, shared: Mapping[str, str]
    ) -> Started:
        cores = ",".join(map(str, sorted(limits.pinned)))
        command = [sys.executable, *self._program, *words]
        with log.open("ab") as said:
            process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-S", "-E", "-c", LAUNCHER, str(os.getpid()), cores, *command],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                env={**environment(limits.cores), **shared},
            )  # fmt: skip
        return _Child(process)


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid, self._process = process.pid, process

    def poll(self) -> Result | None:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        found = result_of(status, usage)
        self._process.returncode = found.code  # it has been waited for
        return found


def result_of(status: int, usage: struct_rusage) -> Result:
    """From what the system says of a process that was waited for."""
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Result(os.waitstatus_to_exitcode(status), cpu_seconds, usage.ru_maxrss * 1024)


def environment(cores: int) -> dict[str, str]:
    """Of a process that computes on so many cores, and finds this very program."""
    place = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
    return {**os.environ, **threads, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def watch(process: Started, limits: Limits, stop: Event) -> End:
    """Wait for a process; end it when it takes more than it may, or when `stop` is set."""
    began = weighed = time.monotonic()
    exceeded, stopped = None, False
    while (result := process.poll()) is None:
        now = time.monotonic()
        if now - began > limits.seconds:
            exceeded = f"takes more than {limits.seconds / 60:g} minutes"
        elif limits.memory_bytes is not None and now - weighed > WEIGH_SECONDS:
            weighed = now
            if sum(_resident(process.pid)) > limits.memory_bytes:
                exceeded = f"takes more than {limits.memory_bytes / 1e9:g} GB"
        stopped = stop.is_set()
        if exceeded or stopped:
            result = _ended(process)
            break
        time.sleep(POLL_SECONDS)
    _kill(process.pid, signal.SIGKILL)  # whatever it has left behind
    return End(result, time.monotonic() - began, exceeded, stopped)


def _ended(process: Started) -> Result:
    """End a process: politely, and then not."""
    _kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + LEAVE_SECONDS
    while (result := process.poll()) is None:
        if time.monotonic() > deadline:
            _kill(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return result


def _kill(session: int, number: signal.Signals) -> None:
    """Send a signal to all of a session that have not left its first group."""
    try:
        os.killpg(session, number)
    except (ProcessLookupError, PermissionError):
        return


def _resident(session: int) -> Iterator[int]:
    """Bytes in memory of every process of a session; none where the system does not tell."""
    try:
        places = list(Path("/proc").iterdir())
    except OSError:
        return
    for place in places:
        try:
            if place.name.isdigit() and os.getsid(int(place.name)) == session:
                pages = (place / "statm").read_text("ascii").split()[1]
                yield int(pages) * os.sysconf("SC_PAGESIZE")
        except (OSError, ValueError):  # it has ended
            continue
