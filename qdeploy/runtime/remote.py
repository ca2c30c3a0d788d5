"""A device over SSH: it runs the file and answers; everything else happens here.

The agent's source goes ahead of the requests on the same connection, so nothing is installed there.
Host keys are checked as the user's ssh has them, and nothing is asked. Digests in the answers are
against mix-ups: a device that lies about its answers is not found out by this.
"""

from __future__ import annotations

import json
import math
import shlex
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import IO, Any

import numpy as np

from qdeploy.errors import InputError, NoAnswerError, ProviderError, UsageError
from qdeploy.runtime.interfaces import FLOAT, End, classifier_interface, in_batches_of
from qdeploy.runtime.watchdog import WATCHDOG
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Interface

VERSION = 1  # of the agent's messages
OPTIONS = frozenset({"host", "port", "python", "folder"})
FOLDER = "~/.cache/qdeploy-agent"
CHECKED = (
    "-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4",
)  # fmt: skip
OLDEST = (1, 17)  # onnxruntime
LONGEST_ANSWER_SECONDS = 600.0  # of one request: devices are slow
LONGEST_FAREWELL_SECONDS = 2.0
LARGEST_HEADER = 1 << 20
LARGEST_ANSWER_BYTES = 1 << 28
SAID = 4096  # bytes of what ssh says that are looked at


class Connection:
    """A device that answers one request after the other."""

    def __init__(self, host: str, command: list[str], source: bytes, *, hint: str) -> None:
        self.host, self._hint = host, hint
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        try:
            self._process = subprocess.Popen(  # noqa: S603 - ssh, with options of the profile
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
            )
        except OSError as error:
            self._said.close()
            reason = f"{command[0]}: {error.strerror}"
            raise ProviderError(f"device {host}: {reason}", hint=hint) from error
        weakref.finalize(self, _hang_up, self._process, self._said)
        self._write(source)

    def ask(self, do: str, payload: bytes = b"", **more: object) -> tuple[Mapping[str, Any], bytes]:
        """One request, and what is answered.

        Raises:
            NoAnswerError: the device is not reached, hangs up, or takes too long.
            ProviderError: it answers that it cannot.
        """
        header = json.dumps({"do": do, "bytes": len(payload), **more}).encode()
        with WATCHDOG.watching(LONGEST_ANSWER_SECONDS, self._process.kill):
            self._write(struct.pack(">Q", len(header)) + header + payload)
            found, data = self._receive()
        if "error" in found:
            raise ProviderError(f"device {self.host}: {str(found['error'])[:300]}")
        return found, data

    def _receive(self) -> tuple[Mapping[str, Any], bytes]:
        (length,) = struct.unpack(">Q", self._read(8))
        if length > LARGEST_HEADER:
            raise self._failed("answers something else than the agent")
        try:
            header = json.loads(self._read(length))
            expected = int(header["bytes"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._failed("answers something else than the agent") from error
        if not 0 <= expected <= LARGEST_ANSWER_BYTES:
            raise self._failed(f"wants to answer {expected} bytes")
        return header, self._read(expected)

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise self._failed("does not answer")
        return data

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed("does not answer") from error

    def _failed(self, what: str) -> NoAnswerError:
        """What ssh or the device's python said last is the reason, if they said anything."""
        self._process.kill()
        self._process.wait()
        self._said.seek(max(self._said.tell() - SAID, 0))
        lines = self._said.read(SAID).decode(errors="replace").strip().splitlines()
        reason = f": {lines[-1][:200]}" if lines else ""
        return NoAnswerError(
            f"device {self.host} {what}{reason}",
            hint=self._hint,
        )


def _hang_up(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    """It ends by itself when nothing more can be asked, and clears up; or it is made to."""
    with suppress(OSError, subprocess.TimeoutExpired):  # what was not sent any more
        assert process.stdin is not None  # noqa: S101 - a pipe
        process.stdin.close()
        process.wait(LONGEST_FAREWELL_SECONDS)
    process.kill()
    process.wait()
    assert process.stdout is not None  # noqa: S101 - a pipe
    process.stdout.close()
    said.close()


@dataclass(frozen=True, slots=True)
class RemoteRunner:
    """A file that is open on a device."""

    connection: Connection
    model: str  # its digest
    inputs: tuple[End, ...]
    outputs: int

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""
        return self.inputs[0].fixed_batch

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """See `qdeploy.runtime.known.Runner`."""
        return in_batches_of(self.fixed_batch, lambda part: self._run(part)[0], batch)

    def seconds(self, batch: np.ndarray) -> float:
        """On the device's own clock, without the way there and back."""
        return self._run(batch)[1]

    def interface(self, *, where: str) -> Interface:
        """See `qdeploy.runtime.known.Runner`."""
        return classifier_interface(self.inputs, self.outputs, self.logits, where=where)

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        payload = np.ascontiguousarray(batch, "<f4").tobytes()
        said, data = self.connection.ask("run", payload, model=self.model, shape=list(batch.shape))
        if (said.get("model"), said.get("inputs")) != (self.model, sha256(payload).hexdigest()):
            raise ProviderError(f"device {self.connection.host}: answers about something else")
        values = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
        classes, odd = divmod(values.size, len(batch))
        if said.get("shape") != [len(batch), classes] or odd or not classes or len(data) % 4:
            raise ProviderError(f"device {self.connection.host}: answers no logits")
        logits = values.reshape(len(batch), classes).astype(np.float32)
        seconds = said.get("seconds")
        if not isinstance(seconds, int | float) or not math.isfinite(seconds):
            raise ProviderError(f"device {self.connection.host}: does not say how long it took")
        return logits, float(seconds)


def opened(connection: Connection, model: bytes, spec: RuntimeSpec) -> RemoteRunner:
    """A file on the other side of a connection, which is sent unless it is there.

    Raises:
        NoAnswerError: the other side does not answer.
        ProviderError: it cannot open the file.
    """
    digest = sha256(model).hexdigest()
    there, _ = connection.ask("have", sha256=digest)
    said, _ = connection.ask(
        "open", b"" if there.get("have") else model, sha256=digest,
        optimizations=spec.optimizations,
    )  # fmt: skip
    return RemoteRunner(connection, digest, *_ends(said))


@dataclass(frozen=True, slots=True)
class Ssh:
    """A runtime of `qdeploy.runtime.known`: onnxruntime on the CPU of a device elsewhere."""

    def open(
        self,
        model: bytes,
        spec: RuntimeSpec,
        *,
        spinning: bool = True,  # noqa: ARG002 - nothing else runs there
        saturating: bool = False,  # noqa: ARG002 - the device's own arithmetic is what is asked for
    ) -> RemoteRunner:
        """See `qdeploy.runtime.known.Runtime`."""
        return opened(_connected(spec), model, spec)

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002 - it does not tell
        """Not known."""
        return {}


def _connected(spec: RuntimeSpec) -> Connection:
    options = spec.options
    unknown = sorted(set(options) - OPTIONS)
    if unknown or "host" not in options or options["host"].startswith("-"):
        raise UsageError(
            f"device: runtime ssh {f'has no option {unknown[0]}' if unknown else 'needs a host'}",
            hint='options = { host = "user@device", python = "python3", folder = "~/models" }',
        )
    source = files("qdeploy.runtime").joinpath("agent.py").read_bytes()
    folder = options.get("folder", FOLDER)
    start = f"import sys; exec(sys.stdin.buffer.read({len(source)})); main({folder!r})"
    port = ["-p", options["port"]] if "port" in options else []
    python = shlex.quote(options.get("python", "python3"))
    command = f"{python} -c {shlex.quote(start)}"
    host = options["host"]
    connection = Connection(
        host, ["ssh", *CHECKED, *port, "--", host, command], source,
        hint="ssh to it by hand first: its host key must be known, and no password asked for",
    )  # fmt: skip
    greet(connection)
    return connection


def greet(connection: Connection) -> None:
    """See whether the other side is one that is understood.

    Raises:
        NoAnswerError: it does not answer.
        ProviderError: its onnxruntime is too old.
    """
    said, _ = connection.ask("hello")
    version = str(said.get("onnxruntime"))
    if said.get("agent") != VERSION or _numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ProviderError(
            f"device {connection.host}: has onnxruntime {version}, at least {oldest} is needed"
        )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(p.isdigit() for p in parts) else (0,)


def _ends(said: Mapping[str, Any]) -> tuple[tuple[End, ...], int]:
    """The inputs of a file, and how many outputs it has."""
    try:
        inputs = tuple(
            End(str(one["name"]), tuple(one["shape"]),
                FLOAT if one["type"] == "tensor(float)" else str(one["type"]))
            for one in said["inputs"]
        )  # fmt: skip
        return inputs, int(said["outputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("the device does not say what the file takes") from error
