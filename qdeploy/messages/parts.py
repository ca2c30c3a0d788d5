"""Every part of a protobuf message, found by reflection: what a later format adds is found too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

Part = TypeVar("Part", bound=Message)


def parts(message: Message) -> Iterator[Message]:
    """The message and all messages in it, outer ones first, in the order of their fields."""
    yield from _walk(message, None)


def find(message: Message, kind: type[Part]) -> Iterator[Part]:
    """Every message of a kind, wherever it lies in `message`."""
    for part in _walk(message, kind.DESCRIPTOR.full_name):
        if isinstance(part, kind):
            yield part


def texts(message: Message) -> Iterator[tuple[str, str | bytes]]:
    """Every text field of one message itself, by the field's name; bytes where it is not UTF-8."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in [value] if isinstance(value, str | bytes) else value:
                yield field.name, text


def has_unknown_fields(message: Message) -> bool:
    """Whether one message itself holds fields that its format does not name."""
    return len(UnknownFieldSet(message)) > 0


def _walk(message: Message, target: str | None) -> Iterator[Message]:
    """Messages that are, or may hold, one of type `target`; all of them if it is None."""
    waiting: list[Message] = [message]
    while waiting:
        part = waiting.pop()
        yield part
        inner: list[Message] = []
        for field, value in part.ListFields():
            kind = field.message_type
            if kind is not None and (target is None or _leads_to(kind, target)):
                inner.extend(_messages(value))
        waiting.extend(reversed(inner))


def _messages(value: Any) -> list[Message]:
    return [value] if isinstance(value, Message) else list(value)


@cache
def _leads_to(kind: Descriptor, target: str) -> bool:
    """Whether a message of type `kind` is of the type `target`, or can hold one of it."""
    seen, waiting = {kind.full_name}, [kind]
    while waiting:
        one = waiting.pop()
        if one.full_name == target:
            return True
        for field in one.fields:
            inner = field.message_type
            if inner is not None and inner.full_name not in seen:
                seen.add(inner.full_name)
                waiting.append(inner)
    return False
