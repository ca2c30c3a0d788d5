"""onnxruntime sessions on exactly the provider that was asked for."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from qdeploy.errors import InputError, ProviderError, UsageError, first_line
from qdeploy.formats.onnx.nodes import operators
from qdeploy.machine import cores, exact_8bit_products, processor_flags
from qdeploy.messages.encoded import BLOCK, in_two
from qdeploy.runtime.interfaces import FLOAT, End, classifier_interface, in_batches_of, timed
from qdeploy.runtime.watchdog import WATCHDOG
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Interface

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
RUNTIME_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
INSTALL_HINTS = {
    "cuda": "install onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, or use another --device"
}
FATAL_ONLY = 4
COPIED_TWICE = "Attempt to replace the existing tensor"
VALUES_BESIDE = "session.optimized_model_external_initializers_file_name"
FOR_THIS_PROCESSOR = ("NchwcTransformer",)
LONGEST_RUN_SECONDS = 120.0  # of one batch; onnxruntime stops between two nodes
LONGEST_LOAD_SECONDS = 120.0  # with folding of constants; it stops between two rewritings


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
        return self.run_with({self.input_name: batch})

    def run_with(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """All outputs of a part of a model, which may have several inputs.

        Raises:
            ProviderError: the provider fails while computing.
            InputError: it takes longer than any classifier should.
        """
        options = ort.RunOptions()
        options.log_severity_level = FATAL_ONLY
        late: list[bool] = []

        def end() -> None:
            late.append(True)
            options.terminate = True

        try:
            with WATCHDOG.watching(LONGEST_RUN_SECONDS, end, computes=True):
                values = self.inference.run(None, dict(inputs), options)
        except RUNTIME_ERRORS as error:
            if late:
                raise InputError(
                    f"the model takes more than {LONGEST_RUN_SECONDS:g} s for one batch"
                ) from error
            raise ProviderError(f"onnxruntime cannot run the model: {first_line(error)}") from error
        return dict(zip(self.output_names, values, strict=True))

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""
        first = self.inference.get_inputs()[0].shape[0]
        return first if isinstance(first, int) else None

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """The first output of a classifier; a file with a fixed batch is fed piece by piece."""
        return in_batches_of(self.fixed_batch, self._first, batch)

    def seconds(self, batch: np.ndarray) -> float:
        """See `qdeploy.runtime.known.Runner`."""
        return timed(self.logits, batch)

    def interface(self, *, where: str) -> Interface:
        """See `qdeploy.runtime.known.Runner`."""
        outputs = len(self.inference.get_outputs())
        return classifier_interface(self.inputs, outputs, self.logits, where=where)

    @property
    def inputs(self) -> tuple[End, ...]:
        """What the file takes."""
        return tuple(
            End(given.name, tuple(given.shape), _dtype(given.type))
            for given in self.inference.get_inputs()
        )

    def _first(self, batch: np.ndarray) -> np.ndarray:
        return next(iter(self.run(batch).values()))


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """onnxruntime on one execution provider, as a runtime of `qdeploy.runtime.known`."""

    provider: str

    def open(
        self, model: bytes, spec: RuntimeSpec, *, spinning: bool = True, saturating: bool = False
    ) -> Session:
        """See `open_session`.

        Raises:
            UsageError: the device profile gives options, of which this runtime has none.
        """
        if spec.options:
            raise UsageError(
                f"device: runtime {self.provider} takes no options: {', '.join(spec.options)}"
            )
        return open_session(
            model,
            self.provider,
            optimizations=spec.optimizations,
            spinning=spinning,
            saturating=saturating,
        )

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:
        """Of the graph that onnxruntime hands to the CPU: of others it is not visible."""
        run = model if spec.optimizations == "off" else optimized(model)
        return dict(sorted(Counter(operators(run)).items()))


def _dtype(kind: str) -> str:
    """Numpy's name of a type as onnxruntime has it, where they differ."""
    return FLOAT if kind == "tensor(float)" else kind


def available_providers() -> tuple[str, ...]:
    """Names, as device profiles use them, of the providers this onnxruntime was built with."""
    have = ort.get_available_providers()
    return tuple(name for name, provider in PROVIDERS.items() if provider in have)


def open_session(
    model: bytes,
    provider: str = "cpu",
    *,
    optimizations: Literal["all", "off"] = "all",
    threads: int = 0,
    spinning: bool = True,
    saturating: bool = False,
) -> Session:
    """Open `model` on `provider` alone; onnxruntime by itself would warn and use the CPU.

    Args:
        threads: Intra-op threads; 0 for one per core.
        spinning: Let idle threads wait busily: faster alone, slower beside other sessions.
        saturating: Let pairs of 8-bit products saturate where the processor's own instructions
            do; otherwise products with constant weights are exact on every processor, by kernels
            that take 2.5 times as long, which VNNI does not need. Products of two activations
            are so if they are uint8.

    Raises:
        ProviderError: the provider is not installed, cannot start, or cannot run the whole model.
        InputError: onnxruntime refuses the model.
    """
    have = available_providers()
    if provider not in have:
        raise ProviderError(
            f"execution provider {provider} is not installed (have {', '.join(have)})",
            hint=INSTALL_HINTS.get(provider, "use another --device"),
        )
    options = _options(provider, optimizations, threads)
    if not saturating and not exact_8bit_products(processor_flags()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != "cpu":  # onnxruntime rejects the option for the CPU provider itself
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        with _quiet():
            inference = _loaded_whole(model, options, provider)
    except RUNTIME_ERRORS as error:
        if provider == "cpu":
            raise InputError(f"onnxruntime cannot load the model: {first_line(error)}") from error
        raise _unable(provider, first_line(error)) from error
    if PROVIDERS[provider] not in inference.get_providers():
        raise _unable(provider, f"onnxruntime would use {', '.join(inference.get_providers())}")
    outputs = tuple(output.name for output in inference.get_outputs())
    return Session(inference, inference.get_inputs()[0].name, outputs)


def optimized(
    model: bytes, *, provider: str = "cpu", saved: Literal["onnx", "portable", "ort"] = "onnx"
) -> bytes:
    """The graph that onnxruntime hands to a provider after its own rewriting.

    For the CPU that is the graph that really runs. For others it is what they must be able to run;
    what they make of it is not visible.

    Args:
        saved: portable: without what is laid out for this processor alone. ort: the same in ORT
            format.

    Raises:
        InputError: onnxruntime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = _options(provider, "all", threads=0)
        if provider != "cpu":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        if in_two(model) is not None:  # nobody reads more of it than its nodes
            options.add_session_config_entry(VALUES_BESIDE, "values")
        if saved == "ort":
            options.add_session_config_entry("session.save_model_format", "ORT")
        try:
            _loaded(model, options, "cpu", without=() if saved == "onnx" else FOR_THIS_PROCESSOR)
        except RUNTIME_ERRORS as error:
            raise InputError(f"onnxruntime cannot load the model: {first_line(error)}") from error
        return path.read_bytes()


def _loaded(
    model: bytes, options: ort.SessionOptions, provider: str, *, without: Sequence[str] = ()
) -> ort.InferenceSession:
    late: list[bool] = []

    def end() -> None:
        late.append(True)
        options.set_load_cancellation_flag(True)

    apart = in_two(model)
    if apart is not None:
        model, block = apart.message, apart.block
        options.add_external_initializers_from_files_in_memory([BLOCK], [block], [len(block)])
    try:
        with WATCHDOG.watching(LONGEST_LOAD_SECONDS, end, computes=True):
            return ort.InferenceSession(
                model, options, providers=[PROVIDERS[provider]], disabled_optimizers=list(without)
            )
    except RUNTIME_ERRORS as error:
        if late:
            raise InputError(
                f"the model takes more than {LONGEST_LOAD_SECONDS:g} s to load"
            ) from error
        raise


def _loaded_whole(model: bytes, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    """The session; products of weights that two nodes share are computed in float if need be.

    With `session.x64quantprecision` onnxruntime gives the integers of every node a copy in another
    type, and fails at the second copy. In float the products are as exact.
    """
    try:
        return _loaded(model, options, provider)
    except RUNTIME_ERRORS as error:
        if COPIED_TWICE not in str(error):
            raise
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return _loaded(model, options, provider)


def _options(provider: str, optimizations: str, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = FATAL_ONLY
    if provider != "cpu":
        # No kernel of CUDA dequantizes int32 biases. Folded at load time, constants become the very
        # floats that DequantizeLinear would give; activations are still rounded on the device.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimizations == "off":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's complaints off the terminal: what matters of them comes as an error."""
    ort.set_default_logger_severity(FATAL_ONLY)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if hasattr(ort, "preload_dlls"):  # of CUDA and cuDNN, where they came as Python packages
            ort.preload_dlls()
        yield


def _unable(provider: str, reason: str) -> ProviderError:
    if "fallback to CPU EP has been explicitly disabled" in reason:
        reason = "onnxruntime would run it on the CPU, at least in part"
    return ProviderError(
        f"execution provider {provider} does not work here: {reason}",
        hint=f"qdeploy doctor shows whether {provider} works at all; its libraries may be missing",
    )
