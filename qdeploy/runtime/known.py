"""Where files can be run, a row each.

A runtime is a module that opens files and a row here. What it must know beyond its name, as an
address, is in `RuntimeSpec.options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from qdeploy.errors import UsageError
from qdeploy.runtime.avx2 import Avx2
from qdeploy.runtime.openvino_cpu import OpenVino
from qdeploy.runtime.ort_format import OrtFormat
from qdeploy.runtime.reference import Reference
from qdeploy.runtime.remote import Ssh
from qdeploy.runtime.sessions import OnnxRuntime
from qdeploy.runtime.web import Web
from qdeploy.settings.device import EMULATED, RuntimeSpec
from qdeploy.values import Interface


@runtime_checkable
class Runner(Protocol):
    """A file that is ready to run."""

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """The answers to a batch (images, channels, height, width), of any size: (images, classes).

        Raises:
            ProviderError: the runtime fails while computing.
        """

    def seconds(self, batch: np.ndarray) -> float:
        """How long the runtime takes to answer a batch, where it runs."""

    def interface(self, *, where: str) -> Interface:
        """What the file takes and gives, if it is a classifier of images.

        Raises:
            InputError: it is none; `where` names it in the error.
        """


@runtime_checkable
class Runtime(Protocol):
    """Opens files."""

    def open(
        self, model: bytes, spec: RuntimeSpec, *, spinning: bool = True, saturating: bool = False
    ) -> Runner:
        """`model` on this runtime and no other.

        Args:
            spinning: Let idle threads wait busily: faster alone, slower beside others.
            saturating: Let pairs of 8-bit products saturate where the processor would.

        Raises:
            ProviderError: the runtime is not there, or cannot run the whole model.
            InputError: it refuses the model.
        """

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:
        """How often each operator runs of the graph that the runtime has made; {} if unknown."""


RUNTIMES: Mapping[str, Runtime] = {
    "cpu": OnnxRuntime("cpu"),
    "cuda": OnnxRuntime("cuda"),
    "ort-format": OrtFormat(),
    "openvino": OpenVino(),
    "reference": Reference(),
    EMULATED: Avx2(),
    "ssh": Ssh(),
    "web": Web(),
}


def runtime_of(spec: RuntimeSpec) -> Runtime:
    """The runtime that a device profile names.

    Raises:
        UsageError: there is none of that name.
    """
    if spec.provider not in RUNTIMES:
        raise UsageError(
            f"device: there is no runtime {spec.provider!r}", hint=f"have {', '.join(RUNTIMES)}"
        )
    return RUNTIMES[spec.provider]
