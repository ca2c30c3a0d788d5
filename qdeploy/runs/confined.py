"""Work on a stranger's file in a process of its own, which ends when it takes too much."""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Generic, TypeVar

from qdeploy.errors import NO_MEMORY, InputError, QdeployError

A = TypeVar("A")
B = TypeVar("B")

_ASKER: list[Connection] = []  # of a process that works for another
WALL_FACTOR = 10  # a process that waits uses no CPU; that of a busy machine gets little


@dataclass(frozen=True, slots=True)
class Limits:
    """What one piece of work may take."""

    seconds: int  # of CPU
    memory_bytes: int  # of address space, over what the process has before it; on Linux alone


@dataclass(frozen=True, slots=True)
class _Done(Generic[B]):
    value: B


@dataclass(frozen=True, slots=True)
class _Failed:
    error: QdeployError


@dataclass(frozen=True, slots=True)
class _Bug:
    told: str


class Confined(Generic[A, B]):
    """Runs one function, piece of work by piece of work, in a process that may die of any.

    The process is started when it is first needed, kept for the next piece, and started anew when
    it has ended.

    Args:
        work: A function of a module; what it takes and gives, errors too, is pickled on the way.
    """

    def __init__(self, work: Callable[[A], B]) -> None:
        self._work = work
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        atexit.register(self.stop)

    def do(self, subject: A, limits: Limits, *, what: str) -> B:
        """What `work` makes of `subject`.

        Raises:
            InputError: `what` cannot be worked on within the limits, or ends the process.
            QdeployError: as `work`.
            RuntimeError: a bug in `work`, with its traceback.
        """
        process, there = self._started()
        try:
            there.send((Path.cwd(), subject, limits))
            answer = _answered(there, limits.seconds)
            while isinstance(answer, Limits):  # it goes on with more
                limits = replace(limits, seconds=limits.seconds + answer.seconds)
                answer = _answered(there, limits.seconds)
        except (EOFError, OSError):
            self._running = None
            there.close()
            raise InputError(f"{what}: {_end(process.wait(), limits)}") from None
        except BaseException:  # interrupted: whatever it still says answers another question
            self.stop()
            raise
        match answer:
            case _Done(value):
                done: B = value
                return done
            case _Failed(error):
                raise error
            case _Bug(told):
                raise RuntimeError(told)
        self.stop()
        raise InputError(f"{what}: takes more than {limits.seconds * WALL_FACTOR} s")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            process, there = self._running
            self._running = None
            there.close()
            process.kill()
            process.wait()

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """A fresh interpreter: multiprocessing's own would run the caller's main script again."""
        if self._running is None:
            here, there = Pipe()
            code = f"from qdeploy.runs.confined import serve; serve({there.fileno()})"
            places = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
            process = subprocess.Popen(  # noqa: S603 - ourselves; -P: nothing from a stranger's folder
                [sys.executable, "-P", "-c", code], pass_fds=[there.fileno()], env=environment,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            there.close()
            here.send(self._work)
            self._running = process, here
        return self._running


def _answered(there: Connection, seconds: int) -> object:
    """What the process says; None if it takes too long to say anything."""
    return there.recv() if there.poll(seconds * WALL_FACTOR) else None


def serve(handle: int) -> None:
    """Answer whoever holds the other end of a pipe until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks is interrupted, and ends this
    there = Connection(handle)
    _ASKER.append(there)
    work = there.recv()
    while True:
        try:
            folder, subject, limits = there.recv()
        except EOFError:
            return
        os.chdir(folder)
        there.send(_answer(work, subject, limits))


def _answer(work: Callable[[A], B], subject: A, limits: Limits) -> _Done[B] | _Failed | _Bug:
    _limit(resource.RLIMIT_AS, _address_space(limits.memory_bytes))
    _limit(resource.RLIMIT_CPU, int(sum(os.times()[:2])) + 1 + limits.seconds)
    try:
        return _Done(work(subject))
    except QdeployError as error:
        return _Failed(error)
    except MemoryError:
        return _Failed(InputError(NO_MEMORY))
    except Exception:  # noqa: BLE001 - told where it is asked for
        return _Bug(traceback.format_exc())
    finally:
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        _limit(resource.RLIMIT_CPU, resource.RLIM_INFINITY)


def allow(more: Limits) -> None:
    """Let the work that asks take more than it was begun with; without limits, nothing happens."""
    if more.seconds and _ASKER:
        _ASKER[0].send(more)
    for which, amount in (
        (resource.RLIMIT_AS, more.memory_bytes),
        (resource.RLIMIT_CPU, more.seconds),
    ):
        now = resource.getrlimit(which)[0]
        if now != resource.RLIM_INFINITY:
            _limit(which, now + amount)


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    bounded = most if hard == resource.RLIM_INFINITY else min(most, hard) if most >= 0 else hard
    resource.setrlimit(which, (bounded, hard))


def _address_space(more: int) -> int:
    """What this process has, and `more`; no limit where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return resource.RLIM_INFINITY
    return pages * resource.getpagesize() + more


def _end(code: int | None, limits: Limits) -> str:
    """Why a process ended, from its exit code."""
    if code == -signal.SIGXCPU:
        return f"takes more than {limits.seconds} s of CPU"
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"ends the process that looks at it ({name})"
