"""Processes forked off one that has loaded the libraries, and has never seen a model.

Loading them is most of the time of a small cell. The process that they are forked off imports what
is installed, reads no file of a stranger, and has one thread; each cell is as alone in its process
as in a fresh interpreter, and its memory goes with it.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from runpy import run_module
from threading import Lock

from threadpoolctl import threadpool_limits

from qdeploy.errors import OutputError
from qdeploy.fleet.process import Limits, Result, Started, environment, result_of

LARGEST_MESSAGE_BYTES = 1 << 18
PDEATHSIG = 1  # of prctl
LOADED = (
    "qdeploy.api.verbs", "qdeploy.cli.console", "qdeploy.report.to_html", "torch", "torch.export",
    "torch.onnx", "torch._dynamo", "torch.export._trace", "onnxscript.function_libs.torch_lib.ops",
    "qdeploy.runs.securing", "qdeploy.runs.clean",
)  # fmt: skip


class Forks:
    """A process that forks itself for every command; another, if it has ended.

    Args:
        cores: That a command computes on.
        loaded: Modules that it imports before it forks.
    """

    def __init__(self, cores: int, loaded: Sequence[str] = LOADED) -> None:
        self._cores, self._loaded, self._sending = cores, tuple(loaded), Lock()
        self._server, self._socket = self._begun()

    def start(
        self, words: Sequence[str], limits: Limits, log: Path, shared: Mapping[str, str]
    ) -> Started:
        """See `qdeploy.fleet.process.Starter`.

        Raises:
            OutputError: no process could be forked.
        """
        table = {
            "words": list(words),
            "folder": str(Path.cwd()),
            "cores": sorted(limits.pinned),
            "threads": limits.cores,
            "shared": dict(shared),
        }
        reading, writing = os.pipe()
        told = os.fdopen(reading, "rb", buffering=0)
        try:
            with log.open("ab") as said, self._sending:
                if self._server.poll() is not None:
                    self._socket.close()
                    self._server, self._socket = self._begun()
                message = json.dumps(table).encode()
                socket.send_fds(self._socket, [message], [said.fileno(), writing])
        except OSError as error:
            told.close()
            raise OutputError(f"no process can be forked: {error.strerror}") from error
        finally:
            os.close(writing)
        first = told.readline()  # waits until it has been forked
        if not first:
            told.close()
            raise OutputError("no process could be forked: the one that forks has ended")
        return _Forked(int(first), told)

    def close(self) -> None:
        """End it, and whatever it has forked."""
        self._socket.close()
        self._server.kill()
        self._server.wait()

    def _begun(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            handle = there.fileno()
            code = f"from qdeploy.fleet.forks import serve; serve({handle}, {self._loaded!r})"
            server = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-P", "-c", code], pass_fds=[handle],
                stdin=subprocess.DEVNULL, start_new_session=True,
                # threads of a library that starts them when it is loaded would not be forked
                env={**environment(self._cores), "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        return server, here


class _Forked:
    """What the server tells of a process: how it ended."""

    def __init__(self, pid: int, told: io.FileIO) -> None:
        self.pid, self._told = pid, told
        self._result: Result | None = None
        os.set_blocking(told.fileno(), False)

    def poll(self) -> Result | None:
        if self._result is None and (line := self._told.read(256)) is not None:
            # nothing more: the server has ended, and all that it had forked with it
            self._result = Result(**json.loads(line)) if line else Result(-signal.SIGKILL, 0.0, 0)
            self._told.close()
        return self._result


def serve(handle: int, loaded: Sequence[str]) -> None:
    """Fork whenever the other end of a socket asks, until it is closed."""
    _end_with_parent()
    for name in loaded:
        with suppress(ImportError):  # is not installed, or is called otherwise in this version
            import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks is interrupted, and ends this
    asked = socket.socket(fileno=handle)
    ended, told = os.pipe()
    for end in (ended, told):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    running: dict[int, int] = {}  # where to tell how it ended, by process
    words = None
    with selectors.DefaultSelector() as selector:
        selector.register(asked, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while words is None:
            ready = {key.fd for key, _ in selector.select()}
            if ended in ready:
                os.read(ended, 4096)
                _reap(running)
            if handle in ready:
                message, handles, _, _ = socket.recv_fds(asked, LARGEST_MESSAGE_BYTES, 2)
                if not message:
                    return
                words = _fork(json.loads(message), handles[0], handles[1], running)
    asked.close()
    for end in (ended, told):
        os.close(end)
    _run(words)


def _fork(
    table: Mapping[str, object], log: int, result: int, running: dict[int, int]
) -> list[str] | None:
    """In the forked process the words of its command; None in the one that goes on serving."""
    pid = os.fork()
    if pid:
        os.close(log)
        running[pid] = result
        os.write(result, f"{pid}\n".encode())
        return None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    _end_with_parent()
    for other in (*running.values(), result):
        os.close(other)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return _prepared(table)


def _prepared(table: Mapping[str, object]) -> list[str]:
    """Make this process one that runs a command; its words."""
    words, cores, shared = table["words"], table["cores"], table["shared"]
    assert isinstance(words, list)  # noqa: S101 - we have written it
    assert isinstance(cores, list)  # noqa: S101
    assert isinstance(shared, dict)  # noqa: S101
    if cores:
        os.sched_setaffinity(0, cores)
    if "numpy" in sys.modules:
        threadpool_limits(int(str(table["threads"])), user_api="blas")
    os.environ.update(shared)
    os.chdir(str(table["folder"]))
    return words


def _run(words: list[str]) -> None:
    """As `python -m qdeploy` does, with this process at its end."""
    sys.argv = ["qdeploy", *words]
    run_module("qdeploy", run_name="__main__")


def _reap(running: dict[int, int]) -> None:
    """Tell of every process that has ended how it did."""
    while running:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        result = result_of(status, usage)
        handle = running.pop(pid)
        line = {"code": result.code, "cpu_seconds": result.cpu_seconds}
        with suppress(OSError):  # nobody wants to know any more
            os.write(handle, json.dumps({**line, "peak_bytes": result.peak_bytes}).encode())
        os.close(handle)


def _end_with_parent() -> None:
    """Where the system can, end this process when the one that made it ends."""
    parent = os.getppid()
    getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
