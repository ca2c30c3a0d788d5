"""This machine: its processor, and the libraries that a result depends on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from qdeploy.errors import UsageError

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "onnxscript", "torch", "numpy")

EXTRAS = {
    "scan": ("fickling",),
    "attest": ("securesystemslib",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "demo": ("scikit-learn",),
    "plots": ("matplotlib",),
    "openvino": ("openvino",),
    "ray": ("ray",),
    "fsspec": ("fsspec",),
}  # by any of which an extra is there
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
BF16 = frozenset({"amx_bf16", "avx512_bf16"})  # training in bfloat16 is faster with one of these
X86 = frozenset({"x86_64", "AMD64"})


def installed_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions by name of what is installed; onnxruntime comes under either of its names."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def has_torch() -> bool:
    """Whether torch is installed: what opens checkpoints and what trains needs it."""
    return find_spec("torch") is not None


def require_torch(what: str) -> None:
    """Say what torch is needed for, where it is not installed.

    Raises:
        UsageError: it is not.
    """
    if not has_torch():
        raise UsageError(
            f"{what} needs torch, which is not installed", hint="pip install 'torch>=2.9,<2.14'"
        )


def processor_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(found.partition(":")[2].split())


def exact_8bit_products(flags: frozenset[str]) -> bool:
    """No pair of 8-bit products saturates on this processor, whatever the integers are."""
    return bool(flags & VNNI) or platform.machine() not in X86


_LIMIT: ContextVar[int | None] = ContextVar("cores", default=None)


@contextmanager
def limited_to(threads: int | None) -> Iterator[None]:
    """Use so many cores at most while the context is open; None for all.

    Raises:
        UsageError: less than one.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads}: at least one computes")
    token = _LIMIT.set(threads)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def cores() -> int:
    """Cores this process may use, or fewer within `limited_to`."""
    known = hasattr(os, "sched_getaffinity")
    have = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    limit = _LIMIT.get()
    return have if limit is None else min(have, limit)
