"""OpenVINO on the CPU: another vendor's kernels for the same file (an extra: openvino)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from qdeploy.errors import InputError, ProviderError, UsageError
from qdeploy.machine import cores
from qdeploy.runtime.interfaces import End, classifier_interface, in_batches_of, timed
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Interface

LONGEST_RUN_SECONDS = 120  # of one batch
SETTINGS = {  # float operators in float32, whatever the processor could do
    "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
}  # fmt: skip
PLACES = (
    "Exception from", "Check ", "FrontEnd API failed", "Model wasn't", "Summary", "To facilitate",
)  # fmt: skip
PASSIVE = frozenset({"Input", "Output", "Const", "Reorder", "Reshape"})


@dataclass(frozen=True, slots=True)
class OpenVinoRunner:
    """A compiled model."""

    compiled: Any  # openvino.CompiledModel
    inputs: tuple[End, ...]

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""
        return self.inputs[0].fixed_batch

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """See `qdeploy.runtime.known.Runner`."""
        return in_batches_of(self.fixed_batch, self._run, batch)

    def seconds(self, batch: np.ndarray) -> float:
        """See `qdeploy.runtime.known.Runner`."""
        return timed(self.logits, batch)

    def interface(self, *, where: str) -> Interface:
        """See `qdeploy.runtime.known.Runner`."""
        return classifier_interface(
            self.inputs, len(self.compiled.outputs), self.logits, where=where
        )

    def _run(self, batch: np.ndarray) -> np.ndarray:
        try:
            request = self.compiled.create_infer_request()
            request.start_async({0: np.ascontiguousarray(batch)})
            if not request.wait_for(1000 * LONGEST_RUN_SECONDS):
                request.cancel()
                raise InputError(f"the model takes more than {LONGEST_RUN_SECONDS} s for one batch")
            found: np.ndarray = request.get_output_tensor(0).data
            return found.copy()
        except RuntimeError as error:
            raise ProviderError(f"openvino cannot run the model: {_reason(error)}") from error


@dataclass(frozen=True, slots=True)
class OpenVino:
    """A runtime of `qdeploy.runtime.known`."""

    def open(
        self,
        model: bytes,
        spec: RuntimeSpec,
        *,
        spinning: bool = True,  # noqa: ARG002 - it has no such setting
        saturating: bool = False,  # noqa: ARG002 - its kernels are what they are
    ) -> OpenVinoRunner:
        """See `qdeploy.runtime.known.Runtime`."""
        if spec.options or spec.optimizations != "all":
            raise UsageError("device: runtime openvino takes no options, and always optimizes")
        compiled = _compiled(model)
        inputs = tuple(
            End(
                port.any_name,
                _sizes(port.partial_shape),
                np.dtype(port.element_type.to_dtype()).name,
            )
            for port in compiled.inputs
        )
        return OpenVinoRunner(compiled, inputs)

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002
        """Of the graph that it runs: operator and type, as `Convolution u8` where it is integer."""
        found: Counter[str] = Counter()
        for step in _compiled(model).get_runtime_model().get_ops():
            info = step.get_rt_info()
            kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
            if kind not in PASSIVE:
                found[f"{kind} {precision}"] += 1
        return dict(sorted(found.items()))


def _compiled(model: bytes) -> Any:
    if find_spec("openvino") is None:
        raise ProviderError("openvino is not installed", hint="pip install 'qdeploy[openvino]'")
    core = _core()
    threads = {"INFERENCE_NUM_THREADS": cores()}
    try:
        return core.compile_model(core.read_model(model, b""), "CPU", {**SETTINGS, **threads})
    except RuntimeError as error:
        raise InputError(f"openvino cannot load the model: {_reason(error)}") from error


@cache
def _core() -> Any:
    """The one of this process, which no thread but the last lets go.

    Its CPU plugin sets an alternate signal stack for the thread that loads it, and frees that stack
    where the last core goes: if another thread does that, the next signal (Ctrl-C) is a crash.
    """
    import openvino

    return openvino.Core()


def _reason(error: RuntimeError) -> str:
    """What of its lines says something: the others are where in OpenVINO it was raised."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(PLACES)]
    return (telling or lines or [type(error).__name__])[0][:200]


def _sizes(shape: Any) -> tuple[int | None, ...]:
    return tuple(dim.get_length() if dim.is_static else None for dim in shape)
