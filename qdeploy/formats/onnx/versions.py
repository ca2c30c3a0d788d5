"""Files of older versions of the standard, for what only knows newer ones."""

from __future__ import annotations

import onnx
from onnx.version_converter import convert_version

from qdeploy.values import STANDARD_DOMAINS

OLDEST, NEWER = 19, 21  # before 19, onnx.reference has no DequantizeLinear


def for_reference(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same in a version of which the reference evaluator has all operators.

    Raises:
        Exception: whatever ONNX's converter raises; call it within `foreign_reader`.
    """
    opset = max((e.version for e in proto.opset_import if e.domain in STANDARD_DOMAINS), default=0)
    return proto if opset >= OLDEST else convert_version(proto, NEWER)
