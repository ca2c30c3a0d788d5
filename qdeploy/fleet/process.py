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

POLL_SECONDS, WEIGH_SECONDS, LEAVE_SECONDS = 0.05, 1.0, 10.0
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
class End:
    """How a command ended."""

    code: int  # negative: the signal
    seconds: float
    cpu_seconds: float
    peak_bytes: int  # of its largest process
    exceeded: str | None = None  # the limit it was ended for
    stopped: bool = False  # somebody else wanted it to end


def run(command: Sequence[str], limits: Limits, log: Path, key: Path | None, stop: Event) -> End:
    """Run a command; what it says is added to `log`.

    Args:
        key: The fleet's key, for seeds and for state that is kept.
        stop: Ends the command when it is set.
    """
    began = time.monotonic()
    cores = ",".join(map(str, sorted(limits.pinned)))
    with log.open("ab") as said:
        process = subprocess.Popen(  # noqa: S603 - whoever asks says what
            [sys.executable, "-S", "-E", "-c", LAUNCHER, str(os.getpid()), cores, *command],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            env=_environment(limits, key),
        )  # fmt: skip
    exceeded, stopped = None, False
    weighed = began
    while (status := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        now = time.monotonic()
        if now - began > limits.seconds:
            exceeded = f"takes more than {limits.seconds / 60:g} minutes"
        elif limits.memory_bytes is not None and now - weighed > WEIGH_SECONDS:
            weighed = now
            if sum(_resident(process.pid)) > limits.memory_bytes:
                exceeded = f"takes more than {limits.memory_bytes / 1e9:g} GB"
        stopped = stop.is_set()
        if exceeded or stopped:
            status = _ended(process.pid)
            break
        time.sleep(POLL_SECONDS)
    _, code, usage = status
    process.returncode = os.waitstatus_to_exitcode(code)  # it has been waited for
    _kill(process.pid, signal.SIGKILL)  # whatever it has left behind
    return End(
        code=process.returncode,
        seconds=time.monotonic() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        exceeded=exceeded,
        stopped=stopped,
    )


def _environment(limits: Limits, key: Path | None) -> Mapping[str, str]:
    place = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(limits.cores))
    shared = {"QDEPLOY_KEY": str(key)} if key is not None else {}
    return {**os.environ, **threads, **shared, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _ended(pid: int) -> tuple[int, int, struct_rusage]:
    """End a process: politely, and then not."""
    _kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + LEAVE_SECONDS
    while (status := os.wait4(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            _kill(pid, signal.SIGKILL)
            return os.wait4(pid, 0)
        time.sleep(POLL_SECONDS)
    return status


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
