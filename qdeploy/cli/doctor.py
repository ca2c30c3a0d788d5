"""What this machine can do, for `qdeploy doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from qdeploy.errors import ProviderError, UsageError
from qdeploy.graph.io import identity
from qdeploy.machine import (
    EXTRAS,
    PACKAGES,
    VNNI,
    X86,
    cores,
    installed_versions,
    processor_flags,
)
from qdeploy.runtime.known import RUNTIMES
from qdeploy.settings.device import ANYWHERE, RuntimeSpec


def describe() -> Iterator[tuple[str, str]]:
    """Names and findings, one per line."""
    flags = processor_flags()
    yield (
        "machine",
        f"{platform.machine()}, {cores()} cores, {_memory()}, Python {platform.python_version()}",
    )
    yield "int8", _int8(flags)
    yield "device", f"--device {ANYWHERE}, which is the default: its files answer alike anywhere"
    have = installed_versions()
    for package in PACKAGES:
        yield package, have.get(package, "not installed")
    for name in RUNTIMES:
        yield f"{name} provider", _provider(name)
    for extra, names in EXTRAS.items():
        found = installed_versions(names).items()
        said = ", ".join(f"{name} {version}" for name, version in found)
        yield f"extra {extra}", said or f"not installed: pip install 'qdeploy[{extra}]'"


def _int8(flags: frozenset[str]) -> str:
    if platform.machine() not in X86:
        return "8-bit products are exact on this architecture"
    if flags & VNNI:
        return f"exact 8-bit dot products ({', '.join(sorted(flags & VNNI))})"
    return "no VNNI: full 8-bit weights saturate here; x86-avx2 keeps codes within 64"


def _provider(name: str) -> str:
    try:
        RUNTIMES[name].open(identity(), RuntimeSpec(provider=name))
    except UsageError as error:
        return f"as a device profile describes it ({error.hint})"
    except ProviderError as error:
        return f"no: {error}"
    return "works"


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "memory unknown"
    return f"{size / 2**30:.0f} GiB"
