"""A model as bytes, of whatever size: equal models give equal bytes.

A protobuf message ends at 2 GiB. A larger model is its message without the values of its tensors,
which follow it in one block that the message names as a file of external data. Such bytes are only
ever made and read by this program; in files there is what ONNX says: a message, or a message and
its external data.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx

from qdeploy.messages.parts import find

LARGEST_MESSAGE_BYTES = (1 << 31) - 1
SMALLEST_MOVED_BYTES = 1024  # of a tensor; smaller ones stay in the message
MARK = b"\0qdeploy: message, block\n"  # no message begins with a zero byte
ALIGNMENT = 64
BLOCK = "weights"
BESIDE = ".data"  # the end of the name of the file that holds the block


@dataclass(frozen=True, slots=True)
class InTwo:
    """A model whose message and values lie apart."""

    message: bytes
    block: memoryview


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether a model does not fit into a message."""
    return too_much(sum(len(tensor.raw_data) for tensor in _tensors(proto)))


def too_much(tensor_bytes: int) -> bool:
    """Whether so many do not fit into a message, with some room for all that is no tensor."""
    return tensor_bytes > LARGEST_MESSAGE_BYTES - LARGEST_MESSAGE_BYTES // 128


def encode(proto: onnx.ModelProto) -> bytes:
    """The model's bytes. Its tensors must be in it."""
    if not is_large(proto):
        return proto.SerializeToString(deterministic=True)
    values = (tensor.raw_data for tensor in _tensors(proto) if _moves(tensor))
    return joined(message_of(proto), values)


def message_of(proto: onnx.ModelProto) -> bytes:
    """The message of a model without the values that move into a block."""
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    end = 0
    for tensor in filter(_moves, _tensors(light)):
        length = len(tensor.raw_data)
        start = aligned(end)
        end = start + length
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", BLOCK), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return light.SerializeToString(deterministic=True)


def aligned(end: int) -> int:
    """Where in the block values begin, if those before them end there."""
    return end + -end % ALIGNMENT


def decode(data: bytes) -> onnx.ModelProto:
    """The message with every tensor in it.

    Raises:
        DecodeError: it is none.
    """
    parts = in_two(data)
    if parts is None:
        return onnx.ModelProto.FromString(data)
    proto = onnx.ModelProto.FromString(parts.message)
    for tensor in _elsewhere(proto):
        place = {entry.key: entry.value for entry in tensor.external_data}
        start = int(place["offset"])
        tensor.raw_data = bytes(parts.block[start : start + int(place["length"])])
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    return proto


def files_of(data: bytes, name: str) -> dict[str, bytes | memoryview]:
    """What is written for a model, by file name; what others name comes before them."""
    parts = in_two(data)
    if parts is None:
        return {name: data}
    beside = f"{name}{BESIDE}"
    return {beside: parts.block, name: _located(parts.message, beside)}


def from_files(message: bytes, block: bytes) -> bytes:
    """The model that was written as these two: the inverse of `files_of`."""
    return joined(_located(message, BLOCK), (block,))


def in_two(data: bytes) -> InTwo | None:
    """Message and block of a model that is too large for a message; None of one that is not."""
    if not data.startswith(MARK):
        return None
    start = len(MARK) + 8
    end = start + int.from_bytes(data[len(MARK) : start], "little")
    return InTwo(data[start:end], memoryview(data)[end:])


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return find(proto, onnx.TensorProto)


def _elsewhere(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose values are not in the message."""
    return (t for t in _tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL)


def _moves(tensor: onnx.TensorProto) -> bool:
    return len(tensor.raw_data) >= SMALLEST_MOVED_BYTES


def joined(message: bytes, values: Iterable[bytes | memoryview]) -> bytes:
    """A model of a message and its tensors' values, in the order of their places in the block.

    Each begins where the one before ends, at the next multiple of `ALIGNMENT`.
    """
    with io.BytesIO() as whole:
        whole.write(MARK + len(message).to_bytes(8, "little") + message)
        end = 0
        for value in values:  # one at a time is in memory twice
            start = aligned(end)
            whole.write(b"\0" * (start - end))
            end = start + whole.write(value)
        return whole.getvalue()


def _located(message: bytes, location: str) -> bytes:
    """The message with its tensors' values in a file of another name."""
    proto = onnx.ModelProto.FromString(message)
    for tensor in _elsewhere(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    return proto.SerializeToString(deterministic=True)
