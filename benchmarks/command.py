"""One whole command, in a process of its own, and what it took."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

JUDGED = frozenset({0, 3, 4})  # exit codes of a verdict


@dataclass(frozen=True)
class Took:
    """CPU seconds are those of all threads and of all that it has started."""

    seconds: float
    cpu_seconds: float
    megabytes: float  # the largest process


def qdeploy(
    words: Sequence[str], *, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> Took:
    """Run `qdeploy` with these words; what it says is shown if it ends without a verdict."""
    started = perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qdeploy", *words], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **(variables or {})},
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in JUDGED:
        sys.exit(f"qdeploy {' '.join(words)}\nended with {process.returncode}:\n{said}")
    cpu = usage.ru_utime + usage.ru_stime
    return Took(perf_counter() - started, cpu, usage.ru_maxrss / 1024)
