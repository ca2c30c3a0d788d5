"""x86 without VNNI, emulated on any machine: pairs of 8-bit products that saturate, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qdeploy.errors import UsageError, foreign_reader
from qdeploy.formats.onnx.saturation import EMULATION, LOSS, Product, lost, with_losses
from qdeploy.runtime.reference import ReferenceRunner, ends_of
from qdeploy.settings.device import RuntimeSpec


@dataclass(frozen=True, slots=True)
class Avx2:
    """A runtime of `qdeploy.runtime.known`: the standard's arithmetic, less what saturates.

    Which kernels run on integers is taken to be as onnxruntime does it; sums are in float32 beyond
    the pairs, so that a code of an inner tensor may differ by one.
    """

    def open(
        self,
        model: bytes,
        spec: RuntimeSpec,
        *,
        spinning: bool = True,  # noqa: ARG002 - it has no threads
        saturating: bool = False,  # noqa: ARG002 - that is what it is there for
    ) -> ReferenceRunner:
        """See `qdeploy.runtime.known.Runtime`."""
        if spec.options or spec.optimizations != "all":
            raise UsageError("device: runtime avx2-emulated takes no options")
        proto, products = with_losses(model, "the file")
        with foreign_reader("the model"):
            evaluator = ReferenceEvaluator(proto, new_ops=[_operator(products)])
        return ReferenceRunner(evaluator, ends_of(proto))

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002 - it has none
        """None: it runs the graph as it is written."""
        return {}


def _operator(products: tuple[Product, ...]) -> type[OpRun]:
    """The operator that takes away what one of these products loses."""

    class SaturationLoss(OpRun):
        op_domain = EMULATION

        def _run(
            self, result: np.ndarray, codes: np.ndarray, product: int = 0
        ) -> tuple[np.ndarray]:
            return ((result - lost(products[product], codes)).astype(np.float32),)

    assert SaturationLoss.__name__ == LOSS  # noqa: S101 - by which it is found
    return SaturationLoss
