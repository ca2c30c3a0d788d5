"""Runs ONNX files on the machine that it is sent to: answers there, and judges nothing.

`qdeploy.runtime.remote` sends this source ahead of its requests, so that a device needs python
(3.9 or newer), numpy and onnxruntime, and nothing of qdeploy. It reads requests from standard input
and writes replies to standard output, one for one. Each is

    8 bytes  length of the header, big-endian
    header   JSON; "bytes" is the length of what follows
    payload  a model, or float32 values in the order of C, little-endian

Models are kept in a folder by their digest, so that they are sent once; where that folder cannot be
written to, they are sent again. Every answer names the digests of what was run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Header = dict[str, Any]
Message = tuple[Header, bytes]

VERSION = 1
LARGEST_HEADER = 1 << 20
LARGEST_PAYLOAD = 1 << 31


def receive(source: IO[bytes]) -> tuple[Header | None, bytes]:
    """One message; (None, b"") at the end of the stream."""
    start = source.read(8)
    if len(start) < 8:
        return None, b""
    (length,) = struct.unpack(">Q", start)
    if length > LARGEST_HEADER:
        raise ValueError(f"header of {length} bytes")
    header = json.loads(source.read(length).decode("utf-8"))
    expected = int(header.get("bytes", 0))
    if not 0 <= expected <= LARGEST_PAYLOAD:
        raise ValueError(f"payload of {expected} bytes")
    payload = source.read(expected)
    if len(payload) < expected:
        return None, b""
    return header, payload


def send(sink: IO[bytes], header: Header, payload: bytes) -> None:
    """Write one message."""
    text = json.dumps(dict(header, bytes=len(payload))).encode("utf-8")
    sink.write(struct.pack(">Q", len(text)) + text + payload)
    sink.flush()


def digest(data: bytes) -> str:
    """Of bytes, as both sides write it."""
    return hashlib.sha256(data).hexdigest()


class Agent:
    """One connection: at most one model is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session: Any = None
        self.opened: str | None = None

    def hello(self, *_: object) -> Message:
        """What this machine is."""
        import onnxruntime

        return {
            "agent": VERSION,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "providers": onnxruntime.get_available_providers(),
        }, b""

    def have(self, request: Header, _: bytes) -> Message:
        """Whether a model need not be sent."""
        return {"have": self._kept(request["sha256"]) is not None}, b""

    def open(self, request: Header, payload: bytes) -> Message:
        """Load a model that is sent, or that is here."""
        import onnxruntime

        model = payload or self._kept(request["sha256"])
        if not model or digest(model) != request["sha256"]:
            raise ValueError("the model is not the one that was announced")
        if payload:
            self._keep(request["sha256"], payload)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if request["optimizations"] == "off":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.opened = request["sha256"]
        inputs = [
            {"name": one.name, "shape": list(one.shape), "type": one.type}
            for one in self.session.get_inputs()
        ]
        return {"inputs": inputs, "outputs": len(self.session.get_outputs())}, b""

    def run(self, request: Header, payload: bytes) -> Message:
        """The first output for one batch, and how long the runtime took."""
        import numpy as np

        if self.session is None or self.opened != request["model"]:
            raise ValueError("that model is not open")
        batch = np.frombuffer(payload, "<f4").reshape(request["shape"]).astype(np.float32)
        name = self.session.get_inputs()[0].name
        started = time.perf_counter()
        found = self.session.run(None, {name: batch})[0]
        seconds = time.perf_counter() - started
        values = np.ascontiguousarray(found, "<f4").tobytes()
        return {
            "model": self.opened,
            "inputs": digest(payload),
            "shape": list(found.shape),
            "seconds": seconds,
        }, values

    def _path(self, sha256: str) -> Path:
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise ValueError("no digest")
        return self.folder / f"{sha256}.onnx"

    def _kept(self, sha256: str) -> bytes | None:
        try:
            model = self._path(sha256).read_bytes()
        except OSError:
            return None
        return model if digest(model) == sha256 else None

    def _keep(self, sha256: str, model: bytes) -> None:
        path = self._path(sha256)
        part = path.with_suffix(".part")
        with contextlib.suppress(OSError):  # no room: it is sent again the next time
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_bytes(model)
            part.replace(path)


def main(folder: str) -> None:
    """Answer until the other side hangs up."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print must not get among the replies
    agent = Agent(Path(folder).expanduser())
    does: dict[str, Callable[[Header, bytes], Message]] = {
        "hello": agent.hello,
        "have": agent.have,
        "open": agent.open,
        "run": agent.run,
    }
    while True:
        request, payload = receive(sys.stdin.buffer)
        if request is None:
            return
        try:
            header, data = does[request["do"]](request, payload)
        except Exception as error:  # noqa: BLE001 - the other side says what to make of it
            header, data = {"error": f"{type(error).__name__}: {error}"}, b""
        send(sink, header, data)
