"""Torch modules to ONNX, by torch's own exporters."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qdeploy.errors import InputError, first_line
from qdeploy.formats.onnx.reading import ModelProto, parse_proto
from qdeploy.values import Loaded

EXPORTER_OPSET = 21
SCRIPT_EXPORTER_OPSET = 17  # the exporter for TorchScript ends there
INPUT, LOGITS = "input", "logits"


def to_onnx(loaded: Loaded, shape: tuple[int, int, int]) -> ModelProto:
    """The module as an ONNX message with a dynamic batch.

    Raises:
        InputError: torch cannot export it.
    """
    example = torch.zeros(2, *shape)
    try:
        with _quiet(), torch.no_grad():
            if loaded.kind == "script":
                return _export_script(loaded.content, example)
            return _export_program(_as_module(loaded.content), example)
    except Exception as error:
        raise InputError(
            f"model {loaded.origin.path}: torch cannot export it: {first_line(_innermost(error))}",
            hint="check the input shape; export the model to ONNX where it was made",
        ) from error


def torch_reference(content: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What the loaded module computes."""
    module = _as_module(content)

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(batch)).numpy()

    return run


def _as_module(content: Any) -> nn.Module:
    return content.module() if isinstance(content, torch.export.ExportedProgram) else content


def _export_program(module: nn.Module, example: torch.Tensor) -> ModelProto:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=EXPORTER_OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=[LOGITS],
        verbose=False,
    )
    assert program is not None  # noqa: S101 - the dynamo exporter always gives one
    return program.model_proto


def _export_script(module: nn.Module, example: torch.Tensor) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.onnx"
        torch.onnx.export(
            module,
            (example,),
            path,
            dynamo=False,
            opset_version=SCRIPT_EXPORTER_OPSET,
            dynamic_axes={INPUT: {0: "batch"}, LOGITS: {0: "batch"}},
            input_names=[INPUT],
            output_names=[LOGITS],
        )
        return parse_proto(path.read_bytes(), "exported TorchScript")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress and advice off the terminal; errors still come as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _innermost(error: BaseException) -> BaseException:
    """The first cause: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
