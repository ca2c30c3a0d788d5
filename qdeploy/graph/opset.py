"""A model at another opset, by onnx's own converter."""

from __future__ import annotations

import onnx
from onnx.version_converter import convert_version

from qdeploy.messages.encoded import SMALLEST_MOVED_BYTES, is_large


def at_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same model at that opset; of one that is larger than a message, too."""
    return _converted(proto, opset) if is_large(proto) else convert_version(proto, opset)


def _converted(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same with its large constants going around the converter, which sees inputs for them."""
    light, held = onnx.ModelProto(), list[onnx.TensorProto]()
    light.CopyFrom(proto)
    for tensor in list(light.graph.initializer):
        if len(tensor.raw_data) >= SMALLEST_MOVED_BYTES:
            held.append(tensor)
            stands = light.graph.input.add(name=tensor.name)
            stands.type.tensor_type.elem_type = tensor.data_type
            for size in tensor.dims:
                stands.type.tensor_type.shape.dim.add(dim_value=size)
    names = {tensor.name for tensor in held}
    kept = [tensor for tensor in light.graph.initializer if tensor.name not in names]
    del light.graph.initializer[:]
    light.graph.initializer.extend(kept)
    converted = convert_version(light, opset)
    images = [given for given in converted.graph.input if given.name not in names]
    del converted.graph.input[:]
    converted.graph.input.extend(images)
    converted.graph.initializer.extend(held)
    return converted
