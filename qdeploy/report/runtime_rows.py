"""What the file does on each runtime beside the first, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

INTEGER = re.compile(r"(^|\.)Q[A-Z]|Integer| [ui]8$")

if TYPE_CHECKING:
    from qdeploy.judging.rates import RuntimeAgreement


def runtime_text(found: RuntimeAgreement) -> str:
    """One runtime on one line."""
    if found.unsupported is not None:
        return f"does not run the file: {found.unsupported}"
    return ", ".join(_parts(found)) or "runs the file; nothing was asked"


def _parts(found: RuntimeAgreement) -> Iterator[str]:
    if found.agreement is not None:
        share = found.agreement
        yield (
            f"{share.value:.2f} % ({share.low:.1f} to {share.high:.1f}) of {share.samples} images"
            " answered alike"
        )
    if found.difference is not None:
        yield f"logits at most {found.difference:.2g} % of their range apart"
    if found.boundary is not None and found.boundary.value < 100:
        share = found.boundary
        yield f"{100 - share.value:.1f} % of {share.samples} inputs between two classes got a third"
    if found.milliseconds is not None:
        yield f"{found.milliseconds:.2f} ms an image"
    whole = sum(found.kernels.values())
    if whole:
        integer = sum(n for name, n in found.kernels.items() if _on_integers(name))
        yield f"{integer} of {whole} kernels on integers"


def _on_integers(kernel: str) -> bool:
    """As the runtimes name them: `com.microsoft.QGemm`, `ConvInteger`, `Convolution u8`."""
    return INTEGER.search(kernel) is not None
