"""Texts of strangers as part of one line of ours."""

from __future__ import annotations

from typing import Any

LONGEST_TEXT = 2000  # characters; a name may have millions


def printable(text: object) -> str:
    """`text` on one line of bounded length; done twice it is as done once."""
    whole = str(text)
    shown = visible(whole[: LONGEST_TEXT + 1])
    if len(shown) <= LONGEST_TEXT and len(whole) <= LONGEST_TEXT:
        return shown
    rest = f"... ({len(whole)} characters)"
    return shown[: LONGEST_TEXT - len(rest)] + rest


def visible(text: str) -> str:
    """`text` without what a terminal, a log or a page would obey, whatever its length.

    Characters that do not print become escapes that do: control characters, ends of lines, marks
    that turn the direction of writing, spaces of no width, halves of characters.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def printable_tree(value: Any) -> Any:
    """A JSON value whose texts and keys are all printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): printable_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_tree(item) for item in value]
    return value


def _escaped(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
