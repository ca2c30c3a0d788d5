"""ONNX's own reference evaluator: the standard's text as numpy, of no vendor, and slow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from qdeploy.errors import InputError, ProviderError, UsageError, first_line, foreign_reader
from qdeploy.formats.onnx.versions import for_reference
from qdeploy.runtime.interfaces import FLOAT, End, classifier_interface, in_batches_of, timed
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Interface

LONGEST_RUN_SECONDS = 120  # of one batch
AT_A_TIME = 8  # images; its convolutions unfold what they read


@dataclass(frozen=True, slots=True)
class ReferenceRunner:
    """A model as its operators are defined."""

    evaluator: ReferenceEvaluator
    inputs: tuple[End, ...]

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""
        return self.inputs[0].fixed_batch

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """See `qdeploy.runtime.known.Runner`."""
        if self.fixed_batch is not None:
            return in_batches_of(self.fixed_batch, self._run, batch)
        parts = [batch[at : at + AT_A_TIME] for at in range(0, len(batch), AT_A_TIME)]
        return np.concatenate([self._run(part) for part in parts])

    def seconds(self, batch: np.ndarray) -> float:
        """See `qdeploy.runtime.known.Runner`."""
        return timed(self.logits, batch)

    def interface(self, *, where: str) -> Interface:
        """See `qdeploy.runtime.known.Runner`."""
        outputs = len(self.evaluator.output_names)
        return classifier_interface(self.inputs, outputs, self.logits, where=where)

    def _run(self, batch: np.ndarray) -> np.ndarray:
        started = time.monotonic()
        try:
            with np.errstate(all="ignore"), foreign_reader("the model"):
                outputs = self.evaluator.run(None, {self.inputs[0].name: batch})
        except InputError as error:
            raise ProviderError(
                f"the reference evaluator cannot run the model: {first_line(error)}"
            ) from error
        if time.monotonic() - started > LONGEST_RUN_SECONDS:  # it cannot be stopped on its way
            raise InputError(f"the model takes more than {LONGEST_RUN_SECONDS} s for one batch")
        return np.asarray(next(iter(outputs)))


@dataclass(frozen=True, slots=True)
class Reference:
    """A runtime of `qdeploy.runtime.known`."""

    def open(
        self,
        model: bytes,
        spec: RuntimeSpec,
        *,
        spinning: bool = True,  # noqa: ARG002 - it has no threads
        saturating: bool = False,  # noqa: ARG002 - it adds as the standard says
    ) -> ReferenceRunner:
        """See `qdeploy.runtime.known.Runtime`."""
        if spec.options or spec.optimizations != "all":
            raise UsageError("device: runtime reference takes no options, and has no optimizations")
        with foreign_reader("the model"):
            proto = for_reference(onnx.load_from_string(model))
            evaluator = ReferenceEvaluator(proto)
        return ReferenceRunner(evaluator, ends_of(proto))

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002
        """None: it runs the graph as it is written."""
        return {}


def ends_of(proto: onnx.ModelProto) -> tuple[End, ...]:
    """What a model takes, besides its constants."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return tuple(_end(value) for value in proto.graph.input if value.name not in constants)


def _end(value: onnx.ValueInfoProto) -> End:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    floats = kind.elem_type == onnx.TensorProto.FLOAT
    return End(
        value.name, shape, FLOAT if floats else onnx.TensorProto.DataType.Name(kind.elem_type)
    )
