"""A stranger's ONNX file, read once and checked as far as possible without running it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError
from qdeploy.formats.onnx.external import external_data, load_external
from qdeploy.formats.onnx.rules import errors
from qdeploy.formats.onnx.tensors import all_tensors, is_external
from qdeploy.messages.parts import parts, texts

LARGEST_MODEL_BYTES = (1 << 31) - 1  # a protobuf message cannot be larger
QUANTIZATION_OPS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "ConvInteger", "MatMulInteger",
})  # fmt: skip
ModelProto = onnx.ModelProto


def parse_proto(data: bytes, where: str) -> onnx.ModelProto:
    """`data` as an ONNX message, or an error that says it is none.

    Raises:
        InputError: truncated, empty, or something else.
    """
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError(f"model {where}: not an ONNX file, or a truncated one") from error
    if not proto.graph.node or not proto.ir_version:
        raise InputError(f"model {where}: not an ONNX file (no graph in it)")
    if not _holds_text(proto):
        raise InputError(f"model {where}: a damaged ONNX file (names that are not UTF-8)")
    return proto


def _holds_text(proto: Message) -> bool:
    """Whether every text in the message is text: protobuf gives bytes where it is not UTF-8."""
    return all(isinstance(text, str) for part in parts(proto) for _, text in texts(part))


def keeps_tensors_elsewhere(data: bytes) -> bool:
    """Whether a well-formed model has tensors in other files."""
    return any(map(is_external, all_tensors(onnx.ModelProto.FromString(data))))


def read_untrusted(path: Path, data: bytes | None = None) -> onnx.ModelProto:
    """The ONNX model at `path`, float or quantized, checked as far as possible without running it.

    External data must lie inside the model's own folder and be as long as claimed; every tensor
    must hold as many values as its shape claims, all finite; operators are standard ones, without
    control flow.

    Args:
        data: The bytes at `path`, where they have been read.

    Raises:
        InputError: any of this does not hold.
    """
    where = str(path)
    if data is None:
        data = read_bounded(path, LARGEST_MODEL_BYTES, what="model")
    if len(data) > LARGEST_MODEL_BYTES:
        raise InputError(f"model {where}: larger than {LARGEST_MODEL_BYTES} bytes")
    proto = parse_proto(data, where)
    for finding in external_data(proto, path):
        if finding.level == "error":
            raise InputError(f"model {where}: {finding.message}")
    load_external(proto, path)
    check(proto, where)
    return proto


def read_single_file(path: Path, *, allow: Sequence[str] = ()) -> bytes:
    """The bytes of a model, checked like any untrusted one, that keeps everything in one file.

    Args:
        allow: Patterns of the rules that it may break.

    Raises:
        InputError: as `read_untrusted`, or it keeps tensors in other files.
    """
    where = str(path)
    data = read_bounded(path, LARGEST_MODEL_BYTES, what="model")
    proto = parse_proto(data, where)
    if any(map(is_external, all_tensors(proto))):
        raise InputError(
            f"model {where}: keeps tensors in other files; what is judged must be one file"
        )
    check(proto, where, allow=allow)
    return data


def check(proto: onnx.ModelProto, where: str, *, allow: Sequence[str] = ()) -> None:
    """Refuse a model that claims, holds or asks for what a classifier has no business with.

    Args:
        allow: Patterns of the rules that it may break.

    Raises:
        InputError: the first error that `inspect` finds.
    """
    for finding in errors(proto):
        if not any(fnmatchcase(finding.rule, pattern) for pattern in allow):
            raise InputError(f"model {where}: {finding.message}")


def is_quantized(data: bytes) -> bool:
    """Whether a model, well-formed or not, holds quantization operators."""
    try:
        return holds_integers(onnx.ModelProto.FromString(data))
    except DecodeError:
        return False


def holds_integers(proto: onnx.ModelProto) -> bool:
    """Whether a model holds quantization operators."""
    prefixes = ("QLinear", *QUANTIZATION_OPS)
    return any(node.op_type.startswith(prefixes) for node in proto.graph.node)


def refuse_quantized(proto: onnx.ModelProto, where: str) -> None:
    """Rounding twice would not give the integers that were chosen.

    Raises:
        InputError: the model holds quantization operators.
    """
    for node in proto.graph.node:
        if node.op_type in QUANTIZATION_OPS:
            raise InputError(
                f"model {where}: is already quantized ({node.op_type})",
                hint="give the float32 model it was made from; qdeploy gate judges this file",
            )
