"""What all pages share: one look, and strangers' texts shown as texts."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qdeploy.disk.printable import visible


def environment() -> Environment:
    """Of the templates beside this file; whatever they are given is escaped."""
    return Environment(
        loader=PackageLoader("qdeploy", "report"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def _visible(value: object) -> object:
    """What a page shows of a text that is not the page's own."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value)
    return value
