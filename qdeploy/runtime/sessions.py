"""onnxruntime sessions on exactly the provider that was asked for."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from qdeploy.errors import InputError, ProviderError, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
RUNTIME_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
INSTALL_HINTS = {
    "cuda": "install onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, or use another --device"
}
FATAL_ONLY = 4


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model; `run` maps one batch to its outputs by name."""

    inference: ort.InferenceSession
    input_name: str
    output_names: tuple[str, ...]

    def run(self, batch: np.ndarray) -> Mapping[str, np.ndarray]:
        """All outputs for one batch.

        Raises:
            ProviderError: the provider fails while computing.
        """
        try:
            values = self.inference.run(None, {self.input_name: batch})
        except RUNTIME_ERRORS as error:
            raise ProviderError(f"onnxruntime cannot run the model: {first_line(error)}") from error
        return dict(zip(self.output_names, values, strict=True))

    @property
    def signature(self) -> tuple[list[int | str | None], list[int | str | None]]:
        """Shapes of the input and of the first output."""
        return self.inference.get_inputs()[0].shape, self.inference.get_outputs()[0].shape

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """The single output of a classifier."""
        (value,) = self.run(batch).values()
        return value


def available_providers() -> tuple[str, ...]:
    """Names, as device profiles use them, of the providers this onnxruntime was built with."""
    have = ort.get_available_providers()
    return tuple(name for name, provider in PROVIDERS.items() if provider in have)


def require_provider(name: str) -> None:
    """Fail early where a run would fail late.

    Raises:
        ProviderError: onnxruntime was built without it.
    """
    have = available_providers()
    if name not in have:
        raise ProviderError(
            f"execution provider {name} is not installed (have {', '.join(have)})",
            hint=INSTALL_HINTS.get(name, "use another --device"),
        )


def open_session(
    model: bytes,
    provider: str = "cpu",
    *,
    optimizations: Literal["all", "off"] = "all",
    threads: int = 0,
    spinning: bool = True,
) -> Session:
    """Open `model` on `provider` alone; onnxruntime by itself would warn and use the CPU.

    Args:
        threads: Intra-op threads; 0 for one per core.
        spinning: Let idle threads wait busily: faster alone, slower beside other sessions.

    Raises:
        ProviderError: the provider is not installed or cannot be initialised.
        InputError: onnxruntime refuses the model.
    """
    require_provider(provider)
    options = _options(optimizations, threads)
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != "cpu":  # onnxruntime rejects the option for the CPU provider itself
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        with contextlib.suppress(AttributeError):
            ort.preload_dlls()
    try:
        with warnings.catch_warnings():  # about a fallback, which is an error below
            warnings.simplefilter("ignore")
            inference = ort.InferenceSession(model, options, providers=[PROVIDERS[provider]])
    except RUNTIME_ERRORS as error:
        if provider != "cpu":
            raise ProviderError(
                f"execution provider {provider} does not work here: {first_line(error)}",
                hint="qdeploy doctor shows what this machine can run",
            ) from error
        raise InputError(f"onnxruntime cannot load the model: {first_line(error)}") from error
    if PROVIDERS[provider] not in inference.get_providers():
        raise ProviderError(
            f"execution provider {provider} could not be initialised; onnxruntime fell back to "
            f"{', '.join(inference.get_providers())}",
            hint="qdeploy doctor shows what this machine can run",
        )
    outputs = tuple(output.name for output in inference.get_outputs())
    return Session(inference, inference.get_inputs()[0].name, outputs)


def optimized(model: bytes, *, threads: int = 0) -> bytes:
    """The graph that onnxruntime really runs on the CPU, after its own rewriting."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = _options("all", threads)
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(model, options, providers=[PROVIDERS["cpu"]])
        except RUNTIME_ERRORS as error:
            raise InputError(f"onnxruntime cannot load the model: {first_line(error)}") from error
        return path.read_bytes()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _options(optimizations: str, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = FATAL_ONLY
    if optimizations == "off":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
