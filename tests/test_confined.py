"""What a piece of work takes is bounded, and its end is not that of the one who asked."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.runs.confined import Confined, Limits, allow

LIMITS = Limits(seconds=1, memory_bytes=300_000_000)


def echo(subject: object) -> object:
    return subject, os.getpid(), Path.cwd()


def allocate(megabytes: int) -> int:
    return int(np.ones((megabytes, 1 << 20), np.uint8).sum())


def spin(_: object) -> None:
    while True:
        pass


def spin_with_leave(seconds: float) -> str:
    allow(Limits(seconds=3, memory_bytes=0))
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return "done"


def segfault(_: object) -> None:
    ctypes.string_at(0)


def leave(_: object) -> None:
    os._exit(7)


def refuse(_: object) -> None:
    raise InputError("model m: is empty", hint="fill it")


def break_down(_: object) -> None:
    raise ZeroDivisionError("of ours")


WORK: dict[str, Callable[..., object]] = {
    f.__name__: f
    for f in (echo, allocate, spin, spin_with_leave, segfault, leave, refuse, break_down)
}


def work(subject: tuple[str, object]) -> object:
    name, argument = subject
    return WORK[name](argument)


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    made = Confined(work)
    yield made
    made.stop()


def test_the_work_is_done_elsewhere_and_in_our_folder(confined, tmp_path, monkeypatch):
    first = confined.do(("echo", {"a": Path("b")}), LIMITS, what="it")
    monkeypatch.chdir(tmp_path)
    again = confined.do(("echo", 1), LIMITS, what="it")
    assert first[0] == {"a": Path("b")}
    assert (again[0], again[2]) == (1, tmp_path)
    assert os.getpid() != first[1] == again[1]


@pytest.mark.parametrize(
    ("name", "argument", "says"),
    [
        ("spin", None, "model m: takes more than 1 s of CPU"),
        ("allocate", 1000, "needs more memory than there is"),
        ("segfault", None, "model m: ends the process that looks at it (SIGSEGV)"),
        ("leave", None, "model m: ends the process that looks at it (exit code 7)"),
        ("refuse", None, "model m: is empty"),
    ],
)
def test_what_takes_too_much_is_a_line_and_the_next_piece_is_done(confined, name, argument, says):
    with pytest.raises(InputError) as failed:
        confined.do((name, argument), LIMITS, what="model m")
    assert says in str(failed.value)
    assert failed.value.hint == ("fill it" if name == "refuse" else None)
    assert confined.do(("allocate", 100), LIMITS, what="it") == 100 << 20


def test_limits_are_of_each_piece_and_not_of_all_together(confined):
    for _ in range(4):
        assert confined.do(("allocate", 200), LIMITS, what="it") == 200 << 20


def test_work_that_sees_how_much_there_is_may_allow_itself_more(confined):
    assert confined.do(("spin_with_leave", 2.2), LIMITS, what="it") == "done"
    with pytest.raises(InputError, match="takes more than 4 s of CPU"):
        confined.do(("spin_with_leave", 9.0), LIMITS, what="it")


def test_a_bug_of_ours_is_no_fault_of_the_file(confined):
    with pytest.raises(RuntimeError, match="ZeroDivisionError: of ours"):
        confined.do(("break_down", None), LIMITS, what="it")


def test_who_is_interrupted_leaves_nothing_behind(confined):
    _, pid, _ = confined.do(("echo", 0), LIMITS, what="it")
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the alarm may come at once
            signal.setitimer(signal.ITIMER_REAL, 0.2)  # in here: a busy machine is slow to go on
            confined.do(("spin", None), Limits(60, 1 << 30), what="it")
    finally:
        signal.signal(signal.SIGALRM, previous)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
    assert confined.do(("echo", 2), LIMITS, what="it")[0] == 2
