"""onnxruntime's own file format (.ort), which its mobile and reduced builds read."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import onnx

from qdeploy.errors import UsageError, first_line, foreign_reader
from qdeploy.formats.onnx.nodes import operators
from qdeploy.runtime.sessions import Session, open_session, optimized
from qdeploy.settings.device import RuntimeSpec

CORE_ML = "coreml_supported_mlprogram_ops.md"


@dataclass(frozen=True, slots=True)
class OrtFormat:
    """A runtime of `qdeploy.runtime.known`: the file converted, and run as it then is."""

    def open(
        self, model: bytes, spec: RuntimeSpec, *, spinning: bool = True, saturating: bool = False
    ) -> Session:
        """See `qdeploy.runtime.known.Runtime`."""
        if spec.options or spec.optimizations != "all":
            raise UsageError("device: runtime ort-format takes no options, and is optimized")
        return open_session(as_ort(model), spinning=spinning, saturating=saturating)

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002
        """Of the graph that is in the converted file."""
        return dict(sorted(Counter(operators(optimized(model, saved="portable"))).items()))


@lru_cache(maxsize=4)  # of a run: cleaned, float, rounded to nearest, and the result
def as_ort(model: bytes) -> bytes:
    """The model in ORT format, its graph rewritten for no processor in particular.

    Two conversions are the same graph, and not the same bytes: so the last are kept, and what
    is measured is what is written.

    Raises:
        InputError: onnxruntime refuses the model.
    """
    return optimized(model, saved="ort")


def required_operators(converted: bytes) -> bytes:
    """The configuration of a reduced build of onnxruntime that runs this file and no other."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    with tempfile.TemporaryDirectory() as folder:
        file, config = Path(folder) / "model.ort", Path(folder) / "config"
        file.write_bytes(converted)
        logging.getLogger("ort_format_model.utils").setLevel(logging.ERROR)
        with warnings.catch_warnings(), foreign_reader("the converted file"):
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file to the collector
            create_config_from_models([file], config, enable_type_reduction=False)
        lines = config.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b"#"))  # which hold our paths


def on_phones(model: bytes) -> Iterator[str]:
    """What onnxruntime's usability checker says of providers that are not here, a line each.

    It counts the nodes that a provider's list of operators has, were the batch size fixed.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    try:
        with foreign_reader("the graph"):
            proto = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(model))
            found = {
                "NNAPI": checker.check_nnapi_partitions(proto, False),
                "CoreML": checker.check_coreml_partitions(proto, False, CORE_ML),
            }
    except Exception as error:  # noqa: BLE001 - of a tool that only advises
        yield f"phones: onnxruntime's checker fails on this file: {first_line(error)}"
        return
    for name, parts in found.items():
        taken = f"{parts.num_supported_nodes} of {parts.num_nodes} nodes"
        missing = ", ".join(sorted(parts.unsupported_ops))
        yield (
            f"{name}, by onnxruntime's usability checker: {parts.suitability().name.lower()};"
            f" {taken} in {parts.num_partitions} part{'s' * (parts.num_partitions != 1)}"
            f"{f', without {missing}' if missing else ''}"
        )
