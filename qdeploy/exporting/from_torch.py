"""Torch modules to ONNX, by torch's own exporters."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import InputError, UsageError, first_line
from qdeploy.formats.onnx.external import load_external
from qdeploy.formats.onnx.reading import ModelProto, parse_proto
from qdeploy.values import Loaded

EXPORTER_OPSET = 21
SCRIPT_EXPORTER_OPSET = 17  # the exporter for TorchScript ends there
INPUT, LOGITS = "input", "logits"


def to_onnx(loaded: Loaded, shape: tuple[int, int, int], output: str | None = None) -> ModelProto:
    """The module as an ONNX message with a dynamic batch.

    Args:
        output: Of a module that gives several tensors, the key or place of the logits.

    Raises:
        InputError: torch cannot export it.
        UsageError: it gives several tensors, and nobody says which.
    """
    example = torch.zeros(2, *shape)
    try:
        with _quiet(), torch.no_grad():
            module = _with_one_output(loaded, example, output)
            if loaded.kind == "script":
                return _export_script(module, example)
            return _export_program(module, example)
    except UsageError:
        raise
    except Exception as error:
        raise InputError(
            f"model {loaded.origin.path}: torch cannot export it: {first_line(_innermost(error))}",
            hint="check the input shape; export the model to ONNX where it was made",
        ) from error


def torch_reference(
    loaded: Loaded, output: str | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """What the loaded module computes; `output` as in `to_onnx`."""
    module, where = _as_module(loaded.content), loaded.origin.path

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            given = module(torch.from_numpy(batch))
            return (
                given.numpy()
                if isinstance(given, Tensor)
                else _one(given, output, where)[1].numpy()
            )

    return run


def _as_module(content: Any) -> nn.Module:
    return content.module() if isinstance(content, torch.export.ExportedProgram) else content


class _OneOutput(nn.Module):
    """A module that gives one of the tensors of another."""

    def __init__(self, module: nn.Module, key: str | int) -> None:
        super().__init__()
        self.module, self.key = module, key

    def forward(self, x: Tensor) -> Tensor:
        tensor: Tensor = self.module(x)[self.key]
        return tensor


def _with_one_output(loaded: Loaded, example: Tensor, output: str | None) -> nn.Module:
    module = _as_module(loaded.content)
    given = module(example)
    if isinstance(given, Tensor):
        return module
    key, _ = _one(given, output, loaded.origin.path)
    return _OneOutput(module, key).eval()


def _one(given: Any, output: str | None, where: str) -> tuple[str | int, Tensor]:
    """Which of the tensors that a module gives holds the classes, and that tensor.

    The one that was named; else the one called "logits", as Hugging Face's models have it; else the
    only one.
    """
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    tensors = {key: value for key, value in pairs if isinstance(value, Tensor)}
    names = {str(key): key for key in tensors}
    wanted = output if output is not None else LOGITS
    if wanted in names:
        key = names[wanted]
    elif output is None and len(tensors) == 1:
        (key,) = tensors
    else:
        kind = type(given).__name__
        raise UsageError(
            f"model {where}: gives a {kind} with {', '.join(map(repr, names)) or 'no tensor'}",
            hint=f"say which holds the classes: --output {next(iter(names), 'NAME')}",
        )
    return key, tensors[key]


def _export_program(module: nn.Module, example: torch.Tensor) -> ModelProto:
    shapes = ({0: torch.export.Dim("batch")},)
    traced = torch.export.export(module, (example,), dynamic_shapes=shapes)
    _means_for_global_pooling(traced.graph_module)
    program = torch.onnx.export(
        traced,
        (example,),
        dynamo=True,
        opset_version=EXPORTER_OPSET,
        dynamic_shapes=shapes,
        input_names=[INPUT],
        output_names=[LOGITS],
        verbose=False,
    )
    assert program is not None  # noqa: S101 - the dynamo exporter always gives one
    return program.model_proto


def _means_for_global_pooling(module: torch.fx.GraphModule) -> None:
    """Average pooling to one value as the mean that it is.

    Where channels lie last in memory, torch takes it apart into a mean and a copy of that memory,
    which in ONNX becomes an indexing across the images of the batch.
    """
    aten, graph = torch.ops.aten, module.graph
    for node in graph.find_nodes(op="call_function", target=aten.adaptive_avg_pool2d.default):
        x, size = node.args
        if list(size) == [1, 1]:
            with graph.inserting_before(node):
                mean = graph.call_function(aten.mean.dim, (x, [-1, -2], True))
            mean.meta = dict(node.meta)
            node.replace_all_uses_with(mean)
            graph.erase_node(node)
    module.recompile()


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
        proto = parse_proto(path.read_bytes(), "exported TorchScript")
        load_external(proto, path)  # of a model that no single file holds
        return proto


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
